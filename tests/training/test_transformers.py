"""The mixin for Hugging Face's Trainer, on a randomly initialised BERT of two thousand parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import polytask
from polytask.balancing import make
from polytask.errors import InputError

transformers = pytest.importorskip("transformers", reason="the extra polytask[transformers] is not installed")

from polytask.transformers import MultiTaskTrainerMixin  # noqa: E402


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.encoder = transformers.BertModel(config, add_pooling_layer=False)
        self.topic, self.stars = nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, input_ids):
        self.z = self.encoder(input_ids).last_hidden_state[:, 0]
        return {"topic": self.topic(self.z), "stars": self.stars(self.z)[:, 0]}


def losses_of(model, inputs):
    outputs = model(inputs["input_ids"])
    losses = {
        "topic": F.cross_entropy(outputs["topic"], inputs["topic"]),
        "stars": F.mse_loss(outputs["stars"], inputs["stars"]),
    }
    return losses, outputs


class TwoTasks(MultiTaskTrainerMixin, transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, outputs = losses_of(model, inputs)
        return (losses, outputs) if return_outputs else losses


def rows(n=48):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 20, (n, 6), generator=generator)
    return [{"input_ids": i, "topic": i[0] % 3, "stars": i.float().mean() / 10} for i in ids]


def trainer(folder: Path, model, cls=TwoTasks, options=None, **arguments):
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        learning_rate=0.01,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        label_names=["topic", "stars"],
        logging_steps=2,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **{"max_steps": 6, "save_strategy": "no", **arguments},
    )
    return cls(model, args, train_dataset=rows(), eval_dataset=rows(16), **(options or {}))


def in_order(monkeypatch) -> None:
    monkeypatch.setattr(
        transformers.Trainer,
        "_get_train_sampler",
        lambda self, *_: torch.utils.data.SequentialSampler(self.train_dataset),
    )


@pytest.mark.parametrize("level", ["representation", "exact"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_it_takes_the_steps_of_the_one_liner(level, pieces, tmp_path: Path, monkeypatch) -> None:
    in_order(monkeypatch)
    model, alone = Model(), Model()
    features = {"features": lambda m: m.z} if level == "representation" else {}
    t = trainer(
        tmp_path,
        model,
        options={"balancer": "upgrad", "level": level, "shared": lambda m: m.encoder.parameters(), **features},
        gradient_accumulation_steps=pieces,
        max_steps=3,
        max_grad_norm=0.5,
    )
    t.train()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.01, weight_decay=0.0)
    balancer, data = make("upgrad"), rows()
    for step in range(3):
        optimizer.zero_grad()
        for piece in range(pieces):
            start = 8 * (step * pieces + piece)
            chosen = data[start : start + 8]
            losses, _ = losses_of(alone, {k: torch.stack([r[k] for r in chosen]) for k in data[0]})
            polytask.backward(
                {n: loss / pieces for n, loss in losses.items()},
                balancer=balancer,
                shared=alone.encoder.parameters(),
                level=level,
                features=alone.z if features else None,
            )
        nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
        optimizer.step()
    for (n, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=n)


def test_every_task_is_logged_and_evaluated(tmp_path: Path) -> None:
    t = trainer(tmp_path, Model(), options={"balancer": "rlw", "shared": lambda m: m.encoder.parameters()})
    t.train()
    training = [entry for entry in t.state.log_history if "loss" in entry]
    assert len(training) == 3
    for entry in training:
        assert entry["loss"] == pytest.approx(entry["loss/topic"] + entry["loss/stars"], rel=1e-4)
        assert entry["weight/topic"] + entry["weight/stars"] == pytest.approx(1.0, rel=1e-4)
    metrics = t.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_loss/topic"] + metrics["eval_loss/stars"], rel=1e-4)


def test_a_resumed_run_goes_on_with_the_balancers_state(tmp_path: Path, monkeypatch) -> None:
    in_order(monkeypatch)
    options = {"balancer": "gradnorm", "shared": lambda m: m.encoder.parameters()}
    straight, broken = Model(), Model()
    whole = trainer(tmp_path / "a", straight, options=options)
    whole.train()
    trainer(tmp_path / "b", broken, options=options, max_steps=4, save_strategy="steps", save_steps=4).train()
    again = trainer(tmp_path / "b", Model(), options=options, save_strategy="steps", save_steps=4)
    again.train(resume_from_checkpoint=True)
    assert str(again.balancer.state_dict()) == str(whole.balancer.state_dict())
    for p, q in zip(again.model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(p, q)


def test_one_loss_is_refused(tmp_path: Path) -> None:
    class Summed(MultiTaskTrainerMixin, transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return sum(losses_of(model, inputs)[0].values())

    with pytest.raises(InputError, match=r"Summed.compute_loss returned Tensor: \{task: loss\} is expected"):
        trainer(tmp_path, Model(), cls=Summed).train()


def test_a_method_that_looks_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"modo looks at the model more than once.*backward_batches"):
        trainer(tmp_path, Model(), options={"balancer": "modo"})
