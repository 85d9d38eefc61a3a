"""Every public name of the peers' balancing methods is found here under that name, or is missing for a reason that stands here.

The names are those of LibMTL 1.1.5 (``LibMTL.weighting``), TorchJD 0.18 (``torchjd.aggregation``, ``torchjd.scalarization``),
LibMOON 0.2.2 (gradient solvers and ``agg_`` functions, without that prefix), the benchmark scripts of Nash-MTL, FAMO and FairGrad, and
papers whose methods stand in no library.
"""

from __future__ import annotations

import pytest

from polytask.balancing import make
from polytask.balancing.presets import PRESETS, resolve
from polytask.errors import InputError
from polytask.registry import find

from .conftest import METHODS

LIBMTL = (
    "EW GradNorm MGDA UW DWA GLS GradDrop PCGrad GradVac IMTL CAGrad Nash_MTL RLW MoCo Aligned_MTL DB_MTL STCH ExcessMTL FairGrad FAMO "
    "MoDo SDMGrad UPGrad Auto_Lambda MOML FORUM"
)
TORCHJD = (
    "AlignedMTL CAGrad ConFIG Constant CRMOGM DualProj ExcessMTL FairGrad GradDrop GradVac IMTLG Krum Mean MGDA MoDo NashMTL PCD PCGrad "
    "Random SDMGrad Sum TrimmedMean UPGrad COSMOS DWA FAMO GeometricMean IMTLL PBI STCH UW"
)
LIBMOON = "EPO PMTL PMGDA MGDA_UB WC_MGDA MOO_SVGD HVGrad UMOD Random ls tche mtche pbi cosmos softtche softmtche pnorm aasf invagg"
SCRIPTS = (
    "stl ls uw scaleinvls rlw dwa pcgrad mgda graddrop log_mgda cagrad log_cagrad LOG_CAGrad LOG_MGDA LOG_IMTLG imtl log_imtl nashmtl famo "
    "fairgrad sdmgrad"
)
PAPERS = (
    "GLS SI UW-O UW-SO IMTL-L IMTL-G GroupDRO TCH mTCH ASF PBI p-norm inverse LDC-MTL Auto-lambda SMG PSMGD GS-MGDA CR-MOGM "
    "MetaBalance IGBv1 IGBv2 Go4Align CoBa self-paced M-ConFIG IMGrad GradOPS GO SAMO F-MTL EXTRA TaskForce SON-GOKU CAME-Grad TurboTrain "
    "MTAdam AdaTask MAdam DualOptim_plus RotoGrad Recon"
)
ELSEWHERE = {
    "MTAdam": "optim",
    "AdaTask": "optim",
    "MAdam": "optim",
    "DualOptim_plus": "optim",
    "RotoGrad": "models",
    "Recon": "models",
}
ABSENT = {
    "GO": "no paper or code was found that this name alone would tell; Go4Align is go4align",
    "EXTRA": "only its figures on CelebA were found, neither paper nor code",
    "TaskForce": "its abstract tells what the agents see (Gramian and losses), not what they are rewarded for, nor how they act and learn",
    "stl": "one network a task is a baseline of every study, not a way of balancing",
    "Constant": "equal(preference=...): the weights are an argument, not a method",
    "Mean": "equal, whose weights sum to the number of tasks: half, a third, ... of its step",
    "MOO_SVGD": "moves a set of networks at once: there is no direction of one",
    "HVGrad": "moves a set of networks at once: there is no direction of one",
    "UMOD": "moves a set of preferences at once: there is no direction of one",
}


@pytest.mark.parametrize("name", sorted({*" ".join([LIBMTL, TORCHJD, LIBMOON, SCRIPTS, PAPERS]).split()}))
def test_name(name):
    if name in ELSEWHERE:
        assert find(name).family == ELSEWHERE[name]
    elif name in ABSENT:
        with pytest.raises(InputError, match="no balancing method called"):
            resolve(name)
    else:
        method, implied = resolve(name)
        balancer = make(name, **method.example)
        assert type(balancer) is method.factory
        assert all(getattr(balancer, option) == value for option, value in implied.items())


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("EW", "equal"), ("UW", "uncertainty"), ("GLS", "geometric_mean"), ("Random", "rlw"), ("IMTLL", "imtl_l"), ("Tche", "tchebycheff"),
        ("MGDA_UB", "mgda"), ("SMG", "mgda"), ("PSMGD", "mgda"),
        ("scaleinvls", "scale_invariant"), ("LOG_IMTLG", "imtl_g"), ("log_imtl", "imtl_g"),
        ("log_sum", "scale_invariant"), ("invagg", "inverse"), ("IMTL", "imtl"), ("IGBv2", "igb_v2"), ("GS_MGDA", "modo"),
        ("UPGradWeighting", "upgrad"), ("RandomWeighting", "rlw"), ("CRMOGMWeighting", "cr_mogm"), ("MoDoWeighting", "modo"),
    ],
)  # fmt: skip
def test_meaning(name, means):
    assert resolve(name)[0].name == means


def test_presets_point_at_methods_and_hide_none():
    for name, (method, options) in PRESETS.items():
        assert method in METHODS
        assert set(options) <= set(METHODS[method].options)
        with pytest.raises(InputError):
            find(name)


def test_what_is_asked_for_outweighs_what_a_name_implies():
    assert not make("LOG_CAGrad", log_losses=False).log_losses
    with pytest.raises(InputError, match="no balancing method called 'log_nothing'"):
        make("log_nothing")
