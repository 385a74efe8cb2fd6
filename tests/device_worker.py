"""A device that is none: its tensors are held by the CPU, obey a GPU's rules, and count who looks at them.

A GPU refuses to mix its tensors with those of the CPU (single numbers and indices aside), and whoever looks at a number on it,
or copies something to it and does not say ``non_blocking``, waits for all that was asked of it before. Both can be told without one. Run as a script, since torch registers a
device for the whole process: prints what became of each scenario as JSON.
"""

import collections
import json
import traceback
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from PIL import Image
from tiny import network, pipeline, wrapped
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from unicfg import Branch, ConditionDropout, Guidance, guide, sample_diffusion, sample_hybrid
from unicfg.guidance import branches, mitigations
from unicfg.guidance.schedules import interval, linear
from unicfg.sampling import guided_call

looks: collections.Counter[str] = collections.Counter()


class Far(torch.Tensor):
    """A tensor on the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("far", 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        looks["tolist"] += 1
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("a tensor on a device has no numpy array")


class Device(TorchDispatchMode):
    """While it is entered, tensors can be moved to "far" and made there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


LOOKS = ("_local_scalar_dense", "equal", "is_nonzero", "_linalg_eigh")
SELECTIONS = ("nonzero", "masked_select", "_unique2")
NO_NUMBERS = (
    "cat",
    "stack",
    "embedding",
    "gather",
    "scatter",
    "mm",
    "bmm",
    "addmm",
    "index_select",
)


def run(func, args, kwargs):
    """One operation, by the CPU, if a GPU would have taken it."""
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, Far)]
    near = [tensor for tensor in tensors if not isinstance(tensor, Far)]
    if far and near and name != "copy_":
        first_is_far = isinstance(tensors[0], Far)
        indices = first_is_far and name in ("index", "index_put", "index_put_", "_unsafe_index")
        refused = [t for t in near if t.ndim or name in NO_NUMBERS]
        if (refused and not indices) or (tensors[0].ndim and not first_is_far):
            raise RuntimeError(f"expected all tensors to be on the same device: {name}")
    if far and name in LOOKS:
        looks["number"] += 1
    if far and name in SELECTIONS:
        looks["selection"] += 1
    if far and name in ("index", "index_put", "index_put_"):
        looks["selection"] += any(
            t.dtype == torch.bool for t in tree_leaves(args[1]) if t is not None
        )
    out_far = bool(far)
    if kwargs.get("device") is not None:
        out_far = torch.device(kwargs["device"]).type == "far"
        looks["moved to the CPU"] += bool(far) and not out_far
        looks["moved to the device"] += bool(near) and out_far and not kwargs.get("non_blocking")
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": None}
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if name == "copy_":
        looks["moved to the CPU"] += isinstance(args[1], Far) and not isinstance(args[0], Far)
        out_far = isinstance(args[0], Far)
        waits = not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        looks["moved to the device"] += out_far and not isinstance(args[1], Far) and waits
    held = {id(tensor.held): tensor for tensor in far}
    plain = tree_map(lambda leaf: leaf.held if isinstance(leaf, Far) else leaf, (args, kwargs))
    out = func(*plain[0], **plain[1])

    def wrap(value):
        if not isinstance(value, Tensor) or any(value is tensor for tensor in near):
            return value
        return held[id(value)] if id(value) in held else Far(value) if out_far else value

    return tree_map(wrap, out)


def register() -> None:
    """Tell torch of the device, and of what it calls below a dispatch mode."""
    # not in every version of torch that the library allows
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("far")
    library = torch.library.Library("aten", "IMPL")
    for name, op in (
        ("empty.memory_format", torch.ops.aten.empty.memory_format),
        ("empty_strided", torch.ops.aten.empty_strided.default),
    ):
        library.impl(name, lambda *a, _op=op, **k: run(_op, a, k), "PrivateUse1")

    def copy_from(source, to, non_blocking=False):
        return run(torch.ops.aten.copy_.default, (to, source), {})

    library.impl("_copy_from", copy_from, "PrivateUse1")
    register.library = library  # type: ignore[attr-defined]  # it ends with its object


# scenarios: what a device draws, the same on the CPU

Options = Callable[[str], dict[str, Any]]
PROMPTS, SEEDS = ["a red circle", "two green stars"], [3, 4]
IMAGE, MASK = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
GUIDANCE: dict[str, Options] = {
    "a number": lambda device: {"guidance": Guidance(3.0)},
    "a schedule": lambda device: {"guidance": Guidance(interval(linear(1, 4), 0.2, 0.8))},
    "a scale for each sample": lambda device: {"guidance": Guidance(torch.tensor([1.0, 3.0]))},
    "a negative prompt": lambda device: {
        "guidance": Guidance(branches.negative(2.0, 1.5)),
        "branches": {"negative": "a tiger"},
    },
    "a negative prompt for some": lambda device: {
        "guidance": Guidance(branches.negative(torch.tensor([0.0, 2.0]), 1.5)),
        "branches": {"negative": "a tiger"},
    },
    "scales on the device": lambda device: {
        "guidance": Guidance(torch.tensor([0.0, 3.0]).to(device))
    },
    "weights on the device": lambda device: {
        "guidance": Guidance(
            branches.negative(interval(torch.tensor([1.0, 2.0]).to(device), 0.2, 0.8), 1.5)
        ),
        "branches": {"negative": "a tiger"},
    },
}
OF_LOGITS: dict[str, Options] = {
    "a limit on divergence": lambda device: {
        "guidance": Guidance(5.0, (mitigations.kl_trust_region(0.3),))
    },
    "filters": lambda device: {
        "guidance": Guidance(
            torch.tensor([1.0, 5.0]), (mitigations.top_k_of_cond(8), mitigations.plausibility())
        ),
        "temperature": 0.7,
        "top_k": 9,
        "top_p": 0.9,
    },
}
OF_PREDICTIONS: dict[str, Options] = {
    "apg": lambda device: {"guidance": Guidance(5.0, (mitigations.apg(eta=0.0, momentum=-0.5),))},
    "rescale and a threshold": lambda device: {
        "guidance": Guidance(
            torch.tensor([1.0, 5.0]),
            (mitigations.rescale(0.7), mitigations.dynamic_threshold(limit=2.0)),
        )
    },
    "perp_neg": lambda device: {
        "guidance": Guidance(branches.perp_neg(2.0, torch.tensor([0.0, 1.0]).to(device))),
        "branches": {"negative": "a tiger"},
    },
    "tcfg": lambda device: {"guidance": Guidance(5.0, (mitigations.tcfg(),))},
    "zero_init": lambda device: {"guidance": Guidance(5.0, (mitigations.zero_init(0.2),))},
}
OWN: dict[str, dict[str, Options]] = {
    "ar": OF_LOGITS,
    "masked": {
        **OF_LOGITS,
        "by confidence": lambda device: {"reveal": "cosine", "guidance": Guidance(3.0)},
        "a part of a picture": lambda device: {"init_image": IMAGE, "mask": MASK},
        "refresh": lambda device: {"refresh": 2, "guidance": Guidance(3.0)},
    },
    "diffusion": {
        **OF_PREDICTIONS,
        "cfg_pp": lambda device: {"solver": "cfg_pp", "guidance": Guidance(branches.cfg_pp(0.6))},
        "frequency_decoupled": lambda device: {
            "guidance": Guidance(3.0, (mitigations.frequency_decoupled((1.0, 3.0)),))
        },
        "a scheduler": lambda device: {"scheduler": DDIMScheduler(), "guidance": Guidance(3.0)},
        "heun": lambda device: {"solver": "heun", "guidance": Guidance(3.0)},
        "refresh": lambda device: {"refresh": 2, "guidance": Guidance(3.0)},
        "a part of a picture": lambda device: {"init_image": IMAGE, "mask": MASK},
    },
    "flow": OF_PREDICTIONS,
    "hybrid": {
        **OF_PREDICTIONS,
        "guided states": lambda device: {"guide_at": "states", "guidance": Guidance(3.0)},
        "guided states and predictions": lambda device: {
            "guide_at": "both",
            "guidance": Guidance(3.0, (mitigations.rescale(0.7),)),
        },
    },
}
DRAWN = {
    f"{family}: {name}": (family, options)
    for family, own in OWN.items()
    for name, options in {**GUIDANCE, **own}.items()
}


def draw(family: str, options: Options, device: str) -> dict[str, Any]:
    """What a family draws, and how often it was looked at in 4 and in 8 steps."""
    seen = []
    for steps in (4, 8):
        pipe = pipeline(family=family).to(device)
        own = {} if family == "ar" else {"steps": steps}
        given = options(device)
        looks.clear()
        image = pipe.sample(PROMPTS, seeds=SEEDS, **own, **given)
        seen.append(dict(looks))
    return {"out": image.cpu(), "looks": seen}


def fresh_noise(device: str) -> dict[str, Any]:
    cond = torch.tensor([[1, 2, 3], [4, 5, 6]]).to(device)
    model, guidance = wrapped("diffusion").to(device), Guidance(3.0)
    out = sample_diffusion(model, cond, seeds=SEEDS, guidance=guidance, steps=4, eta=1.0)
    return {"out": out.cpu()}


def other_hybrid(device: str) -> dict[str, Any]:
    model, cond = wrapped("hybrid masked").to(device), torch.tensor([[1, 2, 3], [4, 5, 6]])
    worse = Branch(model=network("hybrid masked", seed=1).to(device))
    out = sample_hybrid(
        model,
        cond.to(device),
        seeds=SEEDS,
        guidance=Guidance(branches.weak(2.0)),
        branches={"weak": worse},
        steps=3,
    )
    return {"out": out.cpu()}


def training(device: str) -> dict[str, Any]:
    """One step of the training wrapper: which conditions are dropped does not depend on the device."""
    inner = network("flow")
    model = ConditionDropout(inner, torch.zeros(3, dtype=torch.long), p=0.5).train()
    model.reseed(0)
    model = model.to(device)
    x, t = torch.linspace(-1, 1, 8 * 2 * 16).view(8, 2, 4, 4), torch.linspace(0.1, 0.9, 8)
    cond = torch.arange(24).view(8, 3) % 12
    with torch.no_grad():
        return {"out": model(x.to(device), cond.to(device), t.to(device)).cpu()}


def in_a_loop(device: str) -> dict[str, Any]:
    def model(x, cond):
        return {"text": x + cond["ids"], "image": x - cond["ids"]}

    cond, x = {"ids": torch.ones(4, 3).to(device)}, torch.arange(12.0).view(4, 3).to(device)
    out = guided_call(
        model,
        cond,
        {"ids": torch.zeros(3).to(device)},
        Guidance(torch.tensor([0.0, 1.0, 2.0, 3.0])),
        0.5,
        inputs=(x,),
    )
    return {"out": torch.stack([out["text"], out["image"]]).cpu()}


def formula(device: str) -> dict[str, Any]:
    cond, uncond = torch.arange(12.0).view(4, 3).to(device), torch.ones(4, 3).to(device)
    each = [guide(cond, uncond, torch.tensor([0.0, 1.0, 2.0, -3.0]).to(device))]
    each += [guide(cond, uncond, s) for s in (0.0, 1.0, 2.5, torch.tensor(2.5))]
    return {"out": torch.stack(each).cpu()}


def scale_elsewhere(device: str) -> dict[str, Any]:
    """A tensor of scales on the CPU with outputs that are not is the caller's mistake."""
    try:
        guide(torch.ones(2, 3).to(device), torch.ones(2, 3).to(device), torch.ones(2))
    except ValueError as error:
        return {"out": torch.zeros(1), "said": str(error)}
    return {"out": torch.zeros(1), "said": ""}


def two_devices(device: str) -> dict[str, Any]:
    """What the pretended device refuses, and one thing that it does not."""
    here, there = torch.arange(3.0), torch.arange(3.0).to(device)
    said = []
    for mix in (
        lambda: there + here,
        lambda: torch.cat([there, here[:1]]),
        lambda: torch.nn.functional.embedding(here.long(), there[:, None]),
        lambda: there * here[2] + there[here.long()],
    ):
        try:
            mix()
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
    return {"out": there.cpu(), "said": said}


def looked_at(device: str) -> dict[str, Any]:
    """A copy to the device, one that nobody waits for, and a look."""
    looks.clear()
    there = torch.arange(3.0).to(device)
    there = there + torch.arange(3.0).to(device, non_blocking=True)
    assert bool((there < 5).all())
    counted = {key: n for key, n in looks.items() if n}
    return {"out": there.cpu(), "looks": counted}


OTHERS: dict[str, Options] = {
    "fresh noise in each step": fresh_noise,
    "hybrid in sets of tokens, away from a weaker model": other_hybrid,
    "a pass of training": training,
    "a loop of one's own": in_a_loop,
    "the formula": formula,
    "scales on another device": scale_elsewhere,
    "tensors of two devices": two_devices,
    "a number is looked at": looked_at,
}


def report(scenario: Options) -> dict[str, Any]:
    """What became of a scenario on the device, beside the CPU."""
    expected = scenario("cpu")
    try:
        with Device():
            got = scenario("far")
    except Exception:
        return {"error": traceback.format_exc()}
    off = float((expected["out"] - got["out"]).abs().max())
    return {"off": off, **{key: value for key, value in got.items() if key != "out"}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    register()
    scenarios = {name: lambda device, _s=s: draw(*_s, device) for name, s in DRAWN.items()} | OTHERS
    print(json.dumps({name: report(s) for name, s in scenarios.items()}))
