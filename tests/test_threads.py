"""Samplings at once, of one model in several threads, give what they give one after the other."""

import dataclasses
import random
import shutil
import sys
import threading
import time
import warnings

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import CAPTIONS, FAMILIES, pipeline, wrapped, wrapped_transformer

from models import TextToImage, compiled
from unicfg import Guidance, sample_autoregressive, sample_diffusion, sample_hybrid, sample_masked
from unicfg.guidance import branches, mitigations, schedules
from unicfg.sampling import Recorder

COND = torch.tensor([[1, 2, 3], [4, 5, 6]])
LOGITS = (mitigations.kl_trust_region(), mitigations.project_logits())
WITH_MEMORY = (mitigations.apg(momentum=-0.5, threshold=2.5), mitigations.rescale())


@pytest.fixture(autouse=True)
def _hurried():
    """Threads take turns a thousand times as often as they do otherwise."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*jobs):
    """What each job returns, all of them started together in threads of their own."""
    start, results, errors = threading.Barrier(len(jobs)), [None] * len(jobs), []

    def run(place, job):
        start.wait()
        try:
            results[place] = job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=own) for own in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def same(ours, theirs) -> bool:
    """Bit for bit, where NaN stands for what was not measured."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours.nan_to_num(-7.0), theirs.nan_to_num(-7.0))
    return all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def jobs_of(pipe):
    """Four samplings of a pipeline that differ in all that a call can say."""
    family = pipe.family
    denoises = family not in ("ar", "masked")
    reined = WITH_MEMORY if denoises else LOGITS
    refresh = {"refresh": 2} if family in ("masked", "diffusion", "flow") else {}

    def job(guidance, prompts, seeds, **options):
        def run():
            recorder = Recorder()
            if family == "hybrid":
                options["head_callback"] = recorder.head
            images = pipe.sample(
                prompts, seeds=seeds, guidance=guidance, callback=recorder, **options
            )
            trace = recorder.trace()
            return images, *(getattr(trace, f.name) for f in dataclasses.fields(trace))

        return run

    away = Guidance(branches.negative(3.0, schedules.linear(0, 1.5)))
    short = {"steps": 4} if family != "ar" else {}
    return [
        job(Guidance(3.0, reined), CAPTIONS[:2], [0, 1], **short),
        job(Guidance(schedules.interval(4.0, 0.4, 0.8)), CAPTIONS[2:], [2, 3], **short, **refresh),
        job(Guidance(torch.tensor([1.5, -1.0, 8.0])), CAPTIONS[:3], [4, 5, 6], **short),
        job(away, CAPTIONS[3:], [7], branches={"negative": CAPTIONS[0]}, **short, **refresh),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_four_samplings_at_once(family):
    pipe = pipeline(family=family)
    jobs = jobs_of(pipe)
    alone = [job() for job in jobs]
    for together in (at_once(*jobs), at_once(*reversed(jobs))[::-1]):
        for own, other in zip(alone, together, strict=True):
            assert same(own, other)
    assert all(not vars(part).keys() & {"cache", "past"} for part in pipe.network.modules())


@pytest.mark.parametrize("family", ["ar", "masked", "diffusion", "hybrid", "hybrid masked"])
def test_nothing_is_left_on_a_model_or_its_guidance(family):
    """Also after a sampling that ends early; and no random number of the caller's is used up."""
    model, options = wrapped(family), {"seeds": [0, 1]}
    tokens = family in ("ar", "masked")
    options["guidance"] = Guidance(3.0, LOGITS if tokens else WITH_MEMORY)
    sample = {"ar": sample_autoregressive, "masked": sample_masked, "diffusion": sample_diffusion}
    sample = sample.get(family, sample_hybrid)
    state = torch.get_rng_state(), model._random.get_state()
    before = [set(vars(part)) for part in model.modules()]
    own = sample(model, COND, **options)

    class Stop(BaseException):
        pass

    def stop(step):
        if step.index == 2:
            raise Stop

    with pytest.raises(Stop):
        sample(model, COND, callback=stop, **options)
    assert torch.equal(sample(model, COND, **options), own)
    assert [set(vars(part)) for part in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state[0])
    assert torch.equal(model._random.get_state(), state[1])
    assert torch.is_grad_enabled() and not any(part.training for part in model.modules())


def test_modes_of_autograd_are_each_threads_own():
    model = wrapped_transformer()

    def job(mode):
        def run():
            with mode():
                return sample_autoregressive(
                    model, COND, seeds=[0, 1], guidance=Guidance(3.0)
                ).clone()

        return run

    jobs = [job(mode) for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad)]
    first, *others = at_once(*jobs)
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(jobs[1](), first)
    ids = first.clone()
    model.model(ids, COND).sum().backward()  # no tensor of the weights has become one for inference
    assert all(p.grad is not None for p in model.model.parameters())


def test_a_family_is_loaded_while_another_is_sampled(tmp_path):
    for family in ("ar", "diffusion"):
        pipeline(family=family).save_pretrained(tmp_path)
    pipe = TextToImage.from_pretrained(tmp_path)
    options = {"seeds": [0, 1], "guidance": Guidance(3.0)}
    alone = pipe.sample(CAPTIONS[:2], **options)

    def load():
        other = TextToImage.from_pretrained(tmp_path, "diffusion")
        return other.sample(CAPTIONS[:2], steps=3, **options)

    def draw():
        return [pipe.sample(CAPTIONS[:2], **options) for _ in range(3)]

    first, loaded, drawn, again = at_once(load, load, draw, draw)
    assert torch.equal(first, loaded)
    assert all(torch.equal(own, alone) for own in drawn + again)


def test_a_scheduler_is_not_blamed_for_what_another_thread_draws():
    class Beside(DDIMScheduler):
        """Each step falls together with a draw in another thread."""

        def step(self, *arguments, **options):
            other = threading.Thread(target=torch.randn, args=(3,))
            other.start()
            other.join()
            return super().step(*arguments, **options)

    model, options = wrapped("diffusion"), {"seeds": [0, 1], "steps": 4}
    plain, beside = (
        sample_diffusion(model, COND, scheduler=own(prediction_type="v_prediction"), **options)
        for own in (DDIMScheduler, Beside)
    )
    assert torch.equal(plain, beside)


@pytest.mark.parametrize("index", [0, 3, 5])
def test_a_scheduler_that_draws_at_any_one_step_is_refused(index):
    class Once(DDIMScheduler):
        def step(self, out, timestep, x):
            stepped = super().step(out, timestep, x)
            if timestep == self.timesteps[index]:
                stepped.prev_sample += torch.randn_like(x)
            return stepped

    with pytest.raises(ValueError, match="draws noise that no seed determines"):
        scheduler = Once(prediction_type="v_prediction")
        sample_diffusion(wrapped("diffusion"), COND, scheduler=scheduler, seeds=[0, 1], steps=6)


class Slowly:
    """A function that lets every other thread come in between, and counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        time.sleep(0.02)
        return self.function(*arguments)


def test_what_is_kept_of_a_network_is_made_once(monkeypatch):
    network = wrapped_transformer().model
    copied, packed = Slowly(compiled._same_weights), Slowly(compiled.pack)
    monkeypatch.setattr(compiled, "CompiledMethod", Slowly(compiled.CompiledMethod))
    monkeypatch.setattr(compiled, "pack", packed)
    methods = at_once(*[lambda: compiled.compiled_method(network, "step")] * 4)
    assert compiled.CompiledMethod.calls == 1 and len({id(method) for method in methods}) == 1
    before = packed.calls
    eager = at_once(*[lambda: methods[0].eager] * 4)
    assert packed.calls == before + 1 and len({id(own) for own in eager}) == 1
    assert copied.calls == 0


def test_nobody_waits_while_the_weights_of_another_network_are_copied(monkeypatch):
    copied, other = (compiled.CompiledMethod(torch.nn.Linear(2, 2), "forward") for _ in range(2))
    other._compiled["kind"] = torch.neg
    found, pack = [], compiled.pack

    def packed(network):
        looking = threading.Thread(target=lambda: found.append(other._known("kind")))
        looking.start()
        looking.join(10)
        assert found
        return pack(network)

    monkeypatch.setattr(compiled, "pack", packed)
    assert copied.eager is copied.eager and found == [torch.neg]


def test_a_kind_is_compiled_once_and_found_by_all(monkeypatch):
    method = compiled.CompiledMethod(torch.nn.Linear(2, 2), "forward")

    class SlowDict(dict):
        def pop(self, *arguments):
            found = super().pop(*arguments)
            time.sleep(0.01)
            return found

    method._compiled = SlowDict()
    working = []

    def first(self, kind, arguments):
        assert not working, "two threads are in the compiler"
        working.append(kind)
        time.sleep(0.02)
        working.clear()
        made.append(kind)
        self._compiled[kind] = lambda x: 2 * x
        return 2 * arguments[0]

    made = []
    monkeypatch.setattr(compiled.CompiledMethod, "_first", first)
    few, many = torch.ones(2, 2), torch.ones(3, 2)
    for _ in range(2):
        out = at_once(*[lambda: method(few)] * 2, *[lambda: method(many)] * 2)
        assert [len(own) for own in out] == [2, 2, 3, 3] and all(bool((o == 2).all()) for o in out)
        assert len(made) == 2
    # the only kind that is left is there also while it is put to the end
    del method._compiled[made[-1]]
    method._failed.add(made[-1])
    left = few if made[0][0][0] == few.shape else many
    *out, failed = at_once(
        *[lambda: method(left)] * 2, lambda: [time.sleep(0.002) or method.failed for _ in range(9)]
    )
    assert all(own is not None for own in out) and not any(failed)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_compiled_samplings_at_once(monkeypatch):
    monkeypatch.setitem(compiled._OPTIONS, "max_autotune", False)
    model = wrapped_transformer(depth=1)

    def job(rows, compile):
        options = {"guidance": Guidance(3.0), "seeds": range(rows), "compile": compile}
        return lambda: sample_autoregressive(model, COND[:1].expand(rows, -1), **options)

    alone = [job(rows, False)() for rows in (1, 2, 1)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        together = at_once(*(job(rows, True) for rows in (1, 2, 1)))
    assert all(torch.equal(own, other) for own, other in zip(alone, together, strict=True))
    (kept,) = [own["step"][1] for network, own in compiled._kept.items() if network is model.model]
    assert len(kept._compiled) == 2 and not kept._failed


def test_int8_samplings_at_once():
    pytest.importorskip("torchao")
    pipe = pipeline().quantize()
    jobs = jobs_of(pipe)[::2]
    alone = [job() for job in jobs]
    assert all(same(own, other) for own, other in zip(alone, at_once(*jobs), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_hundred_samplings_of_the_shipped_weights(record_property):
    """Four threads, all families, at random: each image as it is drawn alone."""
    pipes = {family: TextToImage.from_pretrained("shapes", family) for family in FAMILIES}
    choices = random.Random(0)

    def job():
        family = choices.choice(FAMILIES)
        count = choices.randint(1, 3)
        reined = LOGITS if family in ("ar", "masked") else WITH_MEMORY
        guidance = Guidance(choices.choice([0.0, 1.0, 3.0, 100.0]), choices.choice([(), reined]))
        seeds = [choices.randrange(1000) for _ in range(count)]
        prompts = [f"a {choices.choice(['red', 'blue', 'green'])} circle" for _ in range(count)]
        steps = {} if family == "ar" else {"steps": choices.randint(2, 8)}
        return lambda: pipes[family].sample(prompts, seeds=seeds, guidance=guidance, **steps)

    jobs = [job() for _ in range(200)]
    alone = [own() for own in jobs]
    together = at_once(*(lambda part=part: [own() for own in jobs[part::4]] for part in range(4)))
    for part, images in enumerate(together):
        for own, other in zip(alone[part::4], images, strict=True):
            assert torch.equal(own, other)
    record_property("measured", "200 samplings, 4 threads, all families: no image differs")
