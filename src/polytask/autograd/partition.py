"""Which parameters are shared, by which tasks, and which belong to one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from polytask.autograd.coordinates import coordinates
from polytask.errors import InputError

Parameters = Iterable[Tensor] | nn.Module
Shared = Parameters | Mapping[str, Parameters] | None


@dataclass
class Group:
    """Shared parameters that are balanced together, among the tasks that touch them.

    Attributes:
        key: its name; None for the first group of those given, and for what all tasks share.
        members: positions of the tasks among those present.
        parameters: what they share.
    """

    key: str | None
    members: list[int]
    parameters: list[Tensor]

    @property
    def size(self) -> int:
        """The number of coordinates."""
        return sum(map(coordinates, self.parameters))


def partition(
    names: Sequence[str], complete: bool, reached: list[list[Tensor]], shared: Shared
) -> tuple[list[Group], list[list[Tensor]]]:
    """The groups of shared parameters, and for each loss the parameters that are in none of them.

    Args:
        names: the tasks present.
        complete: whether these are all tasks.
        reached: for each task, the leaves of its loss.
        shared: as given to :func:`polytask.backward`: parameters, or {name: parameters} for groups of them; None finds groups of
            equal readers among all that at least two losses reach.

    Raises:
        InputError: a parameter in two groups; with ``complete`` one that no loss, or only one of several, reaches.
    """
    readers: dict[int, list[int]] = {}
    for k, mine in enumerate(reached):
        for p in mine:
            readers.setdefault(id(p), []).append(k)
    everyone = list(range(len(names)))
    if shared is None:
        by_readers: dict[tuple[int, ...], list[Tensor]] = {}
        for p in {id(p): p for mine in reached for p in mine}.values():
            if len(readers[id(p)]) > 1:
                by_readers.setdefault(tuple(readers[id(p)]), []).append(p)
        groups = [
            Group(None if list(who) == everyone else " ".join(str(names[k]) for k in who), list(who), parameters)
            for who, parameters in by_readers.items()
        ]
    elif isinstance(shared, Mapping):
        if not shared:
            raise InputError("shared= names no group of parameters: leave it out to have them found")
        groups = _named_groups(shared, readers, names, complete)
    else:
        groups = [Group(None, everyone, _trainable(shared))]
        _check_shared(groups[0].parameters, readers, names, complete)
    belongs = {id(p) for g in groups for p in g.parameters}
    return groups, [[p for p in mine if id(p) not in belongs] for mine in reached]


def _named_groups(
    shared: Mapping[str, Parameters], readers: Mapping[int, list[int]], names: Sequence[str], complete: bool
) -> list[Group]:
    groups = []
    listed: dict[int, str] = {}
    for number, (key, parameters) in enumerate(shared.items()):
        mine = _trainable(parameters)
        for p in mine:
            if id(p) in listed:
                raise InputError(
                    f"a parameter of shape {tuple(p.shape)} is listed in the groups {listed[id(p)]!r} and {key!r}"
                )
            listed[id(p)] = key
        members = sorted({k for p in mine for k in readers.get(id(p), ())})
        if not members and complete:
            raise InputError(f"no loss reaches any of the shared parameters of the group {key!r}")
        lonely = [p for p in mine if id(p) not in readers]
        if lonely and complete:
            raise InputError(
                f"no loss reaches a shared parameter of shape {tuple(lonely[0].shape)} in the group {key!r}: take it out, or freeze it"
            )
        single = [p for p in mine if len(readers.get(id(p), ())) == 1]
        if single and complete and len(names) > 1:
            raise InputError(
                f"a parameter of shape {tuple(single[0].shape)} in the group {key!r} is not shared: "
                f"only the loss of {names[readers[id(single[0])][0]]!r} reaches it"
            )
        if members:
            groups.append(Group(None if number == 0 else key, members, mine))
    return groups


def _trainable(parameters: Parameters) -> list[Tensor]:
    if isinstance(parameters, Tensor):  # iterating would take it for its rows
        parameters = [parameters]
    given = list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
    for p in given:
        if not isinstance(p, Tensor):
            raise InputError(f"shared parameters are tensors, and one of those given is of type {type(p).__name__}")
        if not p.is_leaf:
            raise InputError(
                f"a shared parameter of shape {tuple(p.shape)} is computed from others: give those, or this one as features="
            )
    return list({id(p): p for p in given if p.requires_grad}.values())  # tied ones may be listed twice


def _check_shared(
    parameters: list[Tensor], readers: Mapping[int, list[int]], names: Sequence[str], complete: bool
) -> None:
    if not parameters:
        raise InputError("shared= holds no parameter that requires gradients: nothing is to be balanced")
    if not any(id(p) in readers for p in parameters):
        raise InputError("no loss reaches any of the shared parameters: is this the model that made the losses?")
    if not complete:
        return
    lonely = [i for i, p in enumerate(parameters) if id(p) not in readers]
    if lonely:
        shapes = ", ".join(f"number {i} of shape {tuple(parameters[i].shape)}" for i in lonely[:3])
        raise InputError(f"no loss reaches shared parameter {shapes}: take it out of shared=, or freeze it")
    single = [(i, readers[id(p)][0]) for i, p in enumerate(parameters) if len(readers[id(p)]) == 1]
    if len(names) > 1 and single:
        i, k = single[0]
        raise InputError(
            f"shared parameter number {i} of shape {tuple(parameters[i].shape)} is not shared: only the loss of {names[k]!r} reaches it"
        )
