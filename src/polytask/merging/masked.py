"""Bits of each expert beside one base: models that are unpacked task by task.

A merged model serves all tasks at once and pays for it; an expert each costs T models. Between them lie a single task vector of which
every expert switches on its own entries, T bits a parameter beside two models; the signs of each expert's own task vector, T bits beside
one; and a sum that experts come out of by signs of their own, two models whatever T.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from safetensors.torch import save_file
from torch import Tensor

from polytask.errors import InputError, StorageError
from polytask.merging.base import Place
from polytask.merging.bitdelta import BitDelta, signed, size
from polytask.merging.checkpoint import open_checkpoint
from polytask.merging.engine import check_finite
from polytask.merging.in_memory import State, make, specs
from polytask.merging.masking import KeptApart, Masking
from polytask.merging.matching import compute_dtype, dtype_name, match, torch_dtype
from polytask.merging.randes import RanDeS, signs

FILES = ("model.safetensors", "unified.safetensors", "masks.safetensors")
ABOUT = "masks.json"
FORMAT = 2


@dataclass
class MaskedExperts:
    """Experts packed together; :meth:`expert` unpacks one.

    Attributes:
        base: the state that they were fine-tuned from.
        unified: the common task vector, by tensor; without the tensors that experts have nothing common of.
        masks: for each expert, its bits of each tensor, eight to a byte.
        factors: for each expert, what its part of the common task vector is multiplied by.
        sizes: for each expert, of tensors without a common task vector, how far every entry moves to the side that its bit says.
        kept: for each expert, the tensors that were not packed, such as its head.
        drawn: the common task vectors whose columns are multiplied by signs that are drawn for each expert.
        seed: of those draws.
    """

    base: dict[str, Tensor]
    unified: dict[str, Tensor]
    masks: dict[str, dict[str, Tensor]]
    factors: dict[str, float]
    sizes: dict[str, dict[str, float]]
    kept: dict[str, dict[str, Tensor]]
    drawn: tuple[str, ...] = ()
    seed: int = 0

    def expert(self, name: str) -> dict[str, Tensor]:
        r"""The state dict of one expert.

        .. math:: W_0 + \lambda_t\, m_t \odot \tau, \qquad W_0 + \alpha_t (2 m_t - 1), \qquad \text{or} \qquad W_0 + \lambda\, \tau C_t

        Raises:
            InputError: there is no expert of that name.
        """
        if name not in self.masks:
            raise InputError(f"there is no expert {name!r} here; there are {', '.join(self.masks)}")
        state = {n: v.clone() for n, v in self.base.items()}
        for n, tau in self.unified.items():
            part = tau
            if n in self.masks[name]:
                part = tau * _unpacked(self.masks[name][n], tau.shape)
            elif n in self.drawn:
                part = tau * signs(Place(n, self.seed), list(self.masks).index(name), tau)
            state[n] = (state[n].to(tau.dtype) + self.factors[name] * part).to(state[n].dtype)
        for n, alpha in self.sizes[name].items():
            to = torch.promote_types(state[n].dtype, torch.float32)
            tau = signed(_unpacked(self.masks[name][n], state[n].shape), alpha, to)
            state[n] = (state[n].to(to) + tau).to(state[n].dtype)
        return state | {n: v.clone() for n, v in self.kept[name].items()}

    @property
    def bytes(self) -> int:
        """What all of it takes in memory, and about on disk."""
        groups = [self.base, self.unified, *self.masks.values(), *self.kept.values()]
        return sum(v.numel() * v.element_size() for group in groups for v in group.values())

    def save(self, folder: Path) -> None:
        """Write one folder of safetensors and JSON.

        Raises:
            InputError: the folder exists already.
            StorageError: it cannot be written.
        """
        if folder.exists():
            raise InputError(f"{folder} exists already: name another folder")
        names = list(self.masks)
        packed = {f"{i}/{n}": v for i, e in enumerate(names) for n, v in self.masks[e].items()}
        packed |= {f"{i}/kept/{n}": v for i, e in enumerate(names) for n, v in self.kept[e].items()}
        work = folder.with_name(f".{folder.name}.writing")
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir(parents=True)
            for file, tensors in zip(FILES, (self.base, self.unified, packed), strict=True):
                save_file({n: v.detach().cpu().contiguous().clone() for n, v in tensors.items()}, work / file)
            about = {"format": FORMAT, "experts": names}
            about |= {"factors": [self.factors[e] for e in names], "sizes": [self.sizes[e] for e in names]}
            about |= {"drawn": list(self.drawn), "seed": self.seed}
            (work / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            os.replace(work, folder)
        except OSError as error:
            raise StorageError(f"{folder} cannot be written: {(error.strerror or 'unknown reason').lower()}") from None
        finally:
            shutil.rmtree(work, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> MaskedExperts:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: a folder of something else.
            StorageError: a file is missing or cut short.
        """
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            names, factors = list(about["experts"]), [float(f) for f in about["factors"]]
            sizes = [{n: float(a) for n, a in own.items()} for own in about["sizes"]]
            drawn, seed = tuple(about["drawn"]), int(about["seed"])
            known = about["format"] == FORMAT and len(names) == len(factors) == len(sizes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            known = False
        if not known:
            raise InputError(f"{folder} holds no experts packed with masks in the format {FORMAT}")
        checkpoints = [open_checkpoint(folder / f) for f in FILES]
        base, unified, packed = ({n: c.read(n) for n in c.specs} for c in checkpoints)
        masks: dict[str, dict[str, Tensor]] = {e: {} for e in names}
        kept: dict[str, dict[str, Tensor]] = {e: {} for e in names}
        for key, value in packed.items():
            position, _, n = key.partition("/")
            apart = n.startswith("kept/")
            (kept if apart else masks)[names[int(position)]][n.removeprefix("kept/") if apart else n] = value
        by_name = dict(zip(names, factors, strict=True)), dict(zip(names, sizes, strict=True))
        return cls(base, unified, masks, *by_name, kept, drawn, seed)


@torch.no_grad()
def pack(
    base: State,
    experts: Mapping[str, State] | Sequence[State],
    method: str = "emr",
    *,
    skip: Sequence[str] = (),
    seed: int = 0,
    **options: Any,
) -> MaskedExperts:
    """Pack fine-tuned models of one base into one task vector and a mask each, into the signs of each one's own, or into a sum alone.

    Args:
        base: the state dict that the experts were fine-tuned from.
        experts: their state dicts, by name or in a sequence.
        method: ``emr``, ``tall``, ``bitdelta`` or ``randes``.
        skip: patterns of tensors that stay as each expert has them, such as ``"head.*"``.
        seed: of random draws.
        options: the method's own.

    Raises:
        InputError: models that do not fit together, NaN in a tensor, an unknown method or option.

    Cost: a few passes over the task vectors; memory for the result and one tensor's task vectors.
    """
    named = dict(experts) if isinstance(experts, Mapping) else {f"expert {i}": s for i, s in enumerate(experts, 1)}
    if not named:
        raise InputError("there is nothing to pack: no expert was given")
    masking = make(method, **options)
    if not isinstance(masking, KeptApart) or masking.expert is not None:
        raise InputError(f"{masking.method.name} keeps no masks of all experts: merge by it")
    models = [("the base", base), *named.items()]
    found = match([(label, specs(s, label)) for label, s in models], skip)
    unified: dict[str, Tensor] = {}
    masks: dict[str, dict[str, Tensor]] = {e: {} for e in named}
    sizes: dict[str, dict[str, float]] = {e: {} for e in named}
    own, part = torch.zeros(len(named), dtype=torch.float64), torch.zeros(len(named), dtype=torch.float64)
    for n in found.merged:
        for label, s in models:
            check_finite(s[n], n, label)
        to = torch_dtype(compute_dtype(dtype_name(s[n].dtype) for _, s in models))
        W0 = base[n].detach().to("cpu", to)
        D = torch.stack([s[n].detach().to("cpu", to) - W0 for s in named.values()])
        if isinstance(masking, Masking):
            unified[n], chosen = masking.unify(D)
            own += D.abs().reshape(len(D), -1).sum(1, dtype=torch.float64)
            part += (chosen * unified[n].abs()).reshape(len(D), -1).sum(1, dtype=torch.float64)
        elif isinstance(masking, RanDeS):
            unified[n] = masking.superposed(D, Place(n, seed))
            continue
        elif isinstance(masking, BitDelta) and masking.takes(n, W0.ndim):
            chosen = D >= 0
            for e, tau in zip(named, D, strict=True):
                sizes[e][n] = size(tau)
        else:
            continue
        for e, mask in zip(named, chosen, strict=True):
            masks[e][n] = _packed(mask)
    rescaled = isinstance(masking, Masking) and masking.rescaled
    factors = torch.where(part > 0, own / part, 1.0) if rescaled else torch.full_like(own, masking.scale)
    apart = {*unified, *next(iter(masks.values()))}
    return MaskedExperts(
        {n: v.detach().clone() for n, v in base.items()},
        unified,
        masks,
        dict(zip(named, factors.tolist(), strict=True)),
        sizes,
        {e: {n: v.detach().clone() for n, v in s.items() if n not in apart} for e, s in named.items()},
        tuple(n for n, tau in unified.items() if isinstance(masking, RanDeS) and masking.takes(n, tau.ndim)),
        seed,
    )


def _packed(mask: Bool[Tensor, "..."]) -> Tensor:
    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy()))


def _unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    count = int(np.prod(shape, dtype=np.int64))
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).view(tuple(shape))
