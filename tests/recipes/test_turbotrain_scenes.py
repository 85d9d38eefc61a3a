"""The scenes of the TurboTrain recipe, and what its pretraining looks at."""

from __future__ import annotations

import pytest
import torch

from polytask.recipes.driving.scenes import GRID, SIZE, draw
from polytask.recipes.driving.turbotrain import (
    Cooperative,
    detection_f1,
    displacement,
    hidden_blocks,
    masked_loss,
    task_losses,
)


@pytest.fixture(scope="module")
def scenes():
    return draw(24, 0.4, seed=5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Cooperative()


def test_agents_see_a_part_of_what_is_there_and_dropping_takes_more(scenes):
    clear = draw(24, 0.0, seed=5)
    torch.testing.assert_close(scenes.present, clear.present)
    seen, all_seen = scenes.seen[:, :, :, 0], clear.seen[:, :, :, 0]
    assert bool((seen <= all_seen).all())
    assert 0.5 < float(seen.sum() / all_seen.sum()) < 0.7
    assert torch.equal(clear.seen[:, :, -1, 0].amax(1), clear.complete)
    assert not torch.equal(all_seen[:, 0], all_seen[:, 1])  # two places, two views
    heights = clear.seen[:, :, :, 1]
    assert bool(((heights > 0) == (all_seen > 0)).all())


def test_labels_lie_on_objects_and_futures_begin_at_rest_or_move_on(scenes):
    per_scene = scenes.present.sum((1, 2))
    assert 1 <= float(per_scene.min()) <= float(per_scene.max()) <= 8
    at = scenes.present > 0
    assert float(scenes.boxes.abs().amax(1)[~at].max()) == 0
    boxes = scenes.boxes.permute(0, 2, 3, 1)[at]
    assert float(boxes[:, :2].abs().max()) <= 0.5 + 1e-5
    torch.testing.assert_close(boxes[:, 4] ** 2 + boxes[:, 5] ** 2, torch.ones(len(boxes)))
    steps = scenes.futures.permute(0, 2, 3, 1)[at].view(-1, 6, 2)
    lengths = torch.cat([steps[:, :1], steps.diff(dim=1)], 1).norm(dim=2)  # each object keeps its speed
    torch.testing.assert_close(lengths, lengths[:, :1].expand_as(lengths), rtol=1e-3, atol=1e-4)


def test_the_same_number_of_blocks_is_hidden_in_every_scene_and_from_everyone(scenes, model):
    hidden = hidden_blocks(6, 0.7, torch.Generator().manual_seed(0))
    assert hidden.sum((1, 2)).tolist() == [round(0.7 * GRID * GRID)] * 6
    blind = scenes.rows(torch.arange(6))
    mask = hidden.repeat_interleave(2, 1).repeat_interleave(2, 2)
    changed = torch.where(mask[:, None, None, None], torch.rand_like(blind.seen), blind.seen)
    model.eval()
    torch.testing.assert_close(model.reconstruct(blind.seen, hidden), model.reconstruct(changed, hidden))


def test_visible_cells_do_not_count_in_the_masked_loss(scenes, model):
    hidden = hidden_blocks(6, 0.7, torch.Generator().manual_seed(0))
    batch = scenes.rows(torch.arange(6))
    visible = ~hidden.repeat_interleave(2, 1).repeat_interleave(2, 2)
    model.eval()
    loss = masked_loss(model, batch, hidden).item()
    batch.complete[visible] = 1 - batch.complete[visible]
    assert masked_loss(model, batch, hidden).item() == pytest.approx(loss, rel=1e-6)
    batch.complete[~visible] = 1 - batch.complete[~visible]
    assert masked_loss(model, batch, hidden).item() != pytest.approx(loss, rel=1e-3)


class Perfect(Cooperative):
    """Answers with the truth."""

    def __init__(self, truth):
        super().__init__()
        self.truth = truth

    def forward(self, seen):
        logit = torch.where(self.truth.present > 0, 9.0, -9.0)[:, None]
        return {"detection": torch.cat([logit, self.truth.boxes], 1), "prediction": self.truth.futures}


def test_the_truth_scores_best_and_costs_least(scenes):
    oracle = Perfect(scenes)
    assert displacement(oracle, scenes) == 0
    assert detection_f1(oracle, scenes) > 0.97  # objects in neighbouring cells may share a maximum
    losses = task_losses(oracle(scenes.seen), scenes)
    assert float(losses["prediction"]) == 0
    assert float(losses["detection"]) < 1e-3


def test_the_trunk_is_what_tasks_share(scenes, model):
    losses = task_losses(model(scenes.seen[:4]), scenes.rows(torch.arange(4)))
    losses["detection"].backward(retain_graph=True)
    assert all(p.grad is None for p in model.prediction.parameters())
    assert all(bool(p.grad.any()) for p in model.trunk.fusion.parameters())
    assert scenes.seen.shape[-2:] == (SIZE, SIZE)
