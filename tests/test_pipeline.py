"""The pipeline, the pictures and the command line, on a tiny random model."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS, pipeline, transformer

from models import TextToImage
from models.batches import OutOfMemory
from tokenizers_vq import VQTokenizer, VQTokenizerConfig, to_images
from unicfg import Branch, ConditionDropout, Guidance
from unicfg.cli import expand_lists, main
from unicfg.guidance import branches, schedules
from unicfg.pictures import grid, save_picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pipeline().save_pretrained(tmp_path_factory.mktemp("weights") / "tiny")


def opened(file):
    with Image.open(file) as image:
        return image.convert("RGB")


def same(a, b):
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


def test_prompts_to_images():
    pipe = pipeline()
    images = pipe(CAPTIONS, guidance=Guidance(3.0), seeds=[0, 1, 2, 3])
    assert [image.size for image in images] == [(16, 16)] * 4
    assert all(image.mode == "RGB" for image in images)
    alone = pipe(CAPTIONS[2:3], guidance=Guidance(3.0), seeds=[2])
    assert same(alone, images[2:3])
    raw = pipe.sample(CAPTIONS, guidance=Guidance(3.0), seeds=[0, 1, 2, 3])
    assert raw.shape == (4, 3, 16, 16) and same(to_images(raw), images)


def test_guidance_changes_the_image():
    pipe = pipeline()
    one = pipe(CAPTIONS, guidance=Guidance(1.0), seeds=[0] * 4)
    five = pipe(CAPTIONS, guidance=Guidance(5.0), seeds=[0] * 4)
    assert not same(one, five)
    assert same(one, pipe(CAPTIONS, seeds=[0] * 4))  # no guidance is s = 1


def test_saving_and_loading_draws_the_same(folder):
    draw = {"guidance": Guidance(2.0), "seeds": [0, 1, 2, 3]}
    loaded = TextToImage.from_pretrained(folder)
    assert same(loaded(CAPTIONS, **draw), pipeline()(CAPTIONS, **draw))
    assert torch.equal(loaded.model.null_condition, loaded.text.null_condition)


def test_half_precision_weights_are_half_the_size_and_load(folder, tmp_path):
    half = pipeline().save_pretrained(tmp_path / "half", dtype=torch.float16)
    sizes = [(f / "ar/model.safetensors").stat().st_size for f in (half, folder)]
    assert sizes[0] < 0.6 * sizes[1]
    assert len(TextToImage.from_pretrained(half)(["a red circle"], seeds=[0])) == 1


def test_a_trained_null_embedding_is_saved_with_the_pipeline(tmp_path):
    """What was trained as null is what is sampled, also after loading."""
    pipe = pipeline()
    other = torch.full_like(pipe.text.null_condition, 5)
    pipe.model = ConditionDropout(pipe.model.model, other).eval()
    pipe.save_pretrained(tmp_path / "p")
    assert torch.equal(TextToImage.from_pretrained(tmp_path / "p").model.null_condition, other)


def test_parts_that_do_not_belong_together_are_refused():
    pipe = pipeline()
    wrong = ConditionDropout(transformer(condition_length=12), pipe.text.null_condition)
    with pytest.raises(ValueError, match="24 tokens and the tokenizer 25"):
        TextToImage(pipe.text, wrong, pipe.tokenizer)
    wrong = ConditionDropout(transformer(codebook_size=25), pipe.text.null_condition)
    with pytest.raises(ValueError, match="takes 3 text tokens and the text tokenizer gives 12"):
        TextToImage(pipe.text, wrong, pipe.tokenizer)
    with pytest.raises(
        ValueError, match=r"family is 'gan', expected one of ar, masked, diffusion, flow, hybrid"
    ):
        TextToImage(pipe.text, pipe.model, pipe.tokenizer, "gan")
    tokenizer = VQTokenizer(VQTokenizerConfig(16, 4, width=16))
    with pytest.raises(
        ValueError, match="a VQTokenizer, the family 'ar' expects a TokenTransformer"
    ):
        TextToImage(pipe.text, ConditionDropout(tokenizer, pipe.text.null_condition), tokenizer)


def test_names_that_are_nowhere_and_folders_that_are_wrong(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no pipeline at 'nothing': expected one of \["):
        TextToImage.from_pretrained("nothing")
    with pytest.raises(FileNotFoundError, match="no pipeline at"):
        TextToImage.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds the families ar, not flow"):
        TextToImage.from_pretrained(folder, family="flow")
    pipeline().save_pretrained(tmp_path / "new")
    description = tmp_path / "new/pipeline.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"format_version": 7}))
    with pytest.raises(ValueError, match="format_version is 7"):
        TextToImage.from_pretrained(tmp_path / "new")


def test_bad_prompts_are_refused():
    pipe = pipeline()
    with pytest.raises(ValueError, match="prompts is 'a cat'"):
        pipe("a cat", seeds=[0])
    with pytest.raises(ValueError, match=r"prompts is \[\]"):
        pipe([], seeds=[])
    with pytest.raises(ValueError, match="seeds has 1 entries for a batch of 2"):
        pipe(["a", "b"], seeds=[0])


# pictures


def test_a_grid_places_its_images():
    red, blue = (Image.new("RGB", (8, 8), c) for c in ("red", "blue"))
    plain = grid([[red, blue], [blue]], cell=16)
    assert plain.size == (2 * 20 + 4, 2 * 20 + 4)
    assert plain.getpixel((12, 12)) == (255, 0, 0) and plain.getpixel((32, 12)) == (0, 0, 255)
    assert plain.getpixel((12, 32)) == (0, 0, 255) and plain.getpixel((32, 32)) == (255, 255, 255)
    labelled = grid([[red]], row_labels=["a prompt"], column_labels=["s = 1"], cell=16)
    assert labelled.width > 120 and labelled.getpixel((132, 30)) == (255, 0, 0)
    with pytest.raises(ValueError, match="row_labels has 1 entries, expected 2"):
        grid([[red], [blue]], row_labels=["x"])
    with pytest.raises(ValueError, match="rows is empty"):
        grid([])


def test_a_picture_needs_a_suffix_that_is_one(tmp_path):
    with pytest.raises(ValueError, match=r"suffix '\.gnp'"):
        save_picture(Image.new("RGB", (2, 2)), tmp_path / "x.gnp")
    with pytest.raises(ValueError, match="suffix"):
        save_picture(Image.new("RGB", (2, 2)), tmp_path / "x.psd")  # can be read only


# the command line


def run(*arguments):
    try:
        main([str(a) for a in arguments])
    except SystemExit as end:
        return end.code or 0
    return 0


def test_generate_writes_a_grid_of_scales(folder, tmp_path, capsys):
    out = tmp_path / "sub/grid.png"
    code = run(
        "generate", "a red circle", "--weights", folder, "--scales", 0, 1, 4, "-n", 2, "--out", out
    )
    assert code == 0
    assert f"the picture is in {out}" in capsys.readouterr().out
    picture = opened(out)
    assert picture.size[0] > 2 * 128 and picture.size[1] > 3 * 128
    seeds = {"seeds": [0, 1], "guidance": Guidance(4.0)}
    pipe = TextToImage.from_pretrained(folder)
    (big, _) = [i.resize((128, 128), 0) for i in pipe(["a red circle"] * 2, **seeds)]
    x, y = 124, 26 + 2 * 132  # the third row begins below the column labels and two rows
    assert np.array_equal(np.asarray(picture.crop((x, y, x + 128, y + 128))), np.asarray(big))


def test_generate_away_from_a_negative_prompt(folder, tmp_path):
    shared = ("generate", "a red circle", "--weights", folder, "--scale", 3, "-n", 2)
    files = [tmp_path / f"{name}.png" for name in ("away", "plain", "none")]
    assert run(*shared, "--negative", "two green stars", "--away", 2, "--out", files[0]) == 0
    assert run(*shared, "--out", files[1]) == 0
    assert run(*shared, "--negative", "two green stars", "--away", 0, "--out", files[2]) == 0
    away, plain, none = map(opened, files)
    assert same([plain], [none]) and not same([plain], [away])


def test_generate_from_a_file_of_prompts(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\ntwo green stars\n")
    for extra in ((), ("--scales", "1", "3")):
        out = tmp_path / "out.png"
        assert (
            run(
                "generate", "--prompts", prompts, "--weights", folder, "-n", 1, *extra, "--out", out
            )
            == 0
        )
        assert opened(out).size[1] > 2 * 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected either a PROMPT or --prompts FILE"),
        (("x", "--prompts", "file.txt"), "expected either a PROMPT or --prompts FILE"),
        (("--prompts", "none.txt"), "no prompts at none.txt"),
        (("x", "--scale", "nan"), "scale is nan, expected a finite number"),
        (("x", "--scale", "7", "--scales", "1", "2"), "--scale is 7 with --scales, expected one"),
        (("x", "--top-k", "0"), "top_k is 0"),
        (("x", "--top-p", "2"), "top_p is 2"),
        (("x", "--temperature", "-1"), "temperature is -1"),
        (("x", "--away", "2"), "--away is 2.0 without --negative, expected both or none"),
        (("x", "--family", "flow"), "holds the families"),
        (("x", "--out", "picture.xyz"), "suffix '.xyz'"),
    ],
)
def test_mistakes_are_one_clear_line(folder, capsys, arguments, message):
    assert run("generate", *arguments, "--weights", folder) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_lists_of_numbers_on_the_command_line():
    assert expand_lists(["x", "--scales", "0", "-1", "2.5", "-n", "4"]) == [
        "x", "--scales", "0", "--scales", "-1", "--scales", "2.5", "-n", "4",
    ]  # fmt: skip
    assert expand_lists(["--scales", "1", "a cat"]) == ["--scales", "1", "a cat"]
    assert expand_lists(["--scales"]) == ["--scales"]
    assert expand_lists(["--scales", "-n", "2"]) == ["--scales", "-n", "2"]


def test_the_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "unicfg", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "generate" in done.stdout and "train" in done.stdout


# --- many prompts


@pytest.mark.parametrize("family", ["ar", "masked", "diffusion"])
def test_prompts_in_batches_give_the_same_images(family):
    pipe, counts = pipeline(family=family), []
    prompts, seeds = [*CAPTIONS, CAPTIONS[0]], [0, 1, 2, 3, 4]
    guidance = Guidance(branches.negative(2.0, 0.5))
    options = {"guidance": guidance, "branches": {"negative": prompts[::-1]}}
    whole = pipe.sample(prompts, seeds=seeds, **options)

    def seen(step):
        counts.append(len(step.outputs["cond"]))

    parts = pipe.sample(prompts, seeds=seeds, batch_size=2, callback=seen, **options)
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)
    assert set(counts) == {1, 2}


def test_images_to_inpaint_are_split_with_their_prompts():
    pipe, images = pipeline(family="diffusion"), torch.rand(3, 3, 16, 16) * 2 - 1
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:8] = True
    out = pipe.sample(
        CAPTIONS[:3], seeds=[0, 1, 2], init_image=images, mask=mask, steps=2, batch_size=2
    )
    assert torch.equal(out[:, :, 8:], images[:, :, 8:])


OF_EACH = torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    "scale",
    [
        schedules.interval(OF_EACH, 0.3, 0.9),
        schedules.linear(1.0, OF_EACH),
        functools.partial(lambda progress, own: own * progress, own=OF_EACH),
        lambda progress: OF_EACH.clone() if progress > 0.5 else 1.0,
        lambda progress, own=(OF_EACH,): own[0] * progress,
    ],
    ids=range(5),
)
def test_a_tensor_with_an_entry_for_each_sample_is_not_split(scale, monkeypatch):
    pipe, guidance = pipeline(), Guidance(scale)
    monkeypatch.setattr("models.pipeline.MOST_AT_ONCE", 2)
    assert len(pipe.sample(CAPTIONS[:3], seeds=[0, 1, 2], guidance=guidance)) == 3
    with pytest.raises(ValueError, match="batch_size is 2 for 3 prompts, and guidance or branches"):
        pipe.sample(CAPTIONS[:3], seeds=[0, 1, 2], guidance=guidance, batch_size=2)


def test_a_scale_for_each_prompt_is_split_with_them():
    pipe, whole = pipeline(), {"seeds": [0, 1, 2], "guidance": Guidance(OF_EACH)}
    split = pipe.sample(CAPTIONS[:3], batch_size=2, **whole)
    torch.testing.assert_close(split, pipe.sample(CAPTIONS[:3], **whole), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="the scale has 3 values for a batch of 4"):
        pipe.sample(CAPTIONS, seeds=range(4), guidance=Guidance(OF_EACH))


def test_a_branch_may_hold_a_text():
    pipe, away = pipeline(), Guidance(branches.negative(2.0, 0.5))
    given, spelled = (
        pipe.sample(CAPTIONS[:1], seeds=[0], guidance=away, branches={"negative": own})
        for own in (CAPTIONS[1], Branch(cond=CAPTIONS[1]))
    )
    assert torch.equal(given, spelled)
    with pytest.raises(
        TypeError, match=r"cond of the branch 'negative' is \['a'\], expected a ten"
    ):
        pipe.sample(
            CAPTIONS[:1], seeds=[0], guidance=away, branches={"negative": Branch(cond=["a"])}
        )


def test_the_digest_tells_weights_in_any_precision():
    pipe = pipeline()
    first = pipe.digest()
    pipe.model.to(torch.bfloat16)
    assert pipe.digest() != first and pipe.digest() == pipe.digest()


def test_choice_noise_is_for_the_order_by_confidence():
    pipe = pipeline(family="masked")
    with pytest.raises(ValueError, match=r"choice_noise is 2\.0 with reveal 'halton'"):
        pipe.sample(CAPTIONS[:1], seeds=[0], choice_noise=2.0)
    few, many = (
        pipe.sample(CAPTIONS, seeds=range(4), reveal="cosine", choice_noise=noise)
        for noise in (0.0, 50.0)
    )
    assert not torch.equal(few, many)


def test_schedules_by_noise_level_go_through():
    pipe = pipeline(family="diffusion")
    guidance = Guidance(schedules.noise_interval(3.0, 0.2, 5.0))
    assert len(pipe.sample(CAPTIONS[:3], seeds=[0, 1, 2], guidance=guidance, batch_size=2)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"branches": {"negative": CAPTIONS[:3]}},
            "the branch 'negative' is .*, expected a text, 4",
        ),
        ({"init_image": torch.zeros(2, 3, 16, 16)}, "init_image has shape .* for 4 prompts"),
    ],
)
def test_lists_of_another_length_are_refused_before_the_first_batch(options, message):
    pipe = pipeline(family="diffusion")
    guidance = Guidance(branches.negative(2.0, 0.5)) if "branches" in options else None
    mask = torch.ones(16, 16, dtype=torch.bool) if "init_image" in options else None
    with pytest.raises(ValueError, match=message):
        pipe(CAPTIONS, seeds=range(4), guidance=guidance, mask=mask, batch_size=2, **options)


def test_what_cannot_be_made_smaller_says_what_to_lower_and_keeps_what_is_finished(monkeypatch):
    pipe = pipeline()
    draw = type(pipe)._draw

    def scarce(self, jobs, given, callback):
        if jobs.prompts[0] == CAPTIONS[2] or len(jobs.prompts) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(self, jobs, given, callback)

    monkeypatch.setattr(type(pipe), "_draw", scarce)
    with pytest.raises(OutOfMemory, match=r"one image does not fit .* the 2 finished") as raised:
        pipe(CAPTIONS, seeds=range(4), batch_size=1)
    assert raised.value.finished.shape == (2, 3, 16, 16)
    with pytest.raises(OutOfMemory, match="3 images, which cannot be split, do not fit"):
        pipe(CAPTIONS[:3], seeds=range(3), guidance=Guidance(schedules.linear(1.0, OF_EACH)))


def test_a_lack_of_memory_is_one_line_on_the_command_line(folder, capsys, monkeypatch):
    def scarce(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TextToImage, "_draw", scarce)
    assert run("generate", "x", "--weights", folder, "-n", 1) == 2
    assert "error: one image does not fit into memory" in capsys.readouterr().err


def test_a_batch_that_does_not_fit_is_halved_and_what_is_finished_is_kept(monkeypatch):
    pipe, sizes = pipeline(), []
    draw = type(pipe)._draw

    def scarce(self, jobs, given, callback):
        sizes.append(len(jobs.prompts))
        if len(jobs.prompts) > 1:
            torch.empty(10**15)  # as torch says it on this system
        return draw(self, jobs, given, callback)

    whole = pipe.sample(CAPTIONS, seeds=[0, 1, 2, 3], guidance=Guidance(2.0))
    monkeypatch.setattr(type(pipe), "_draw", scarce)
    with pytest.warns(UserWarning, match="do not fit into memory: going on with batch_size="):
        kept = pipe.sample(CAPTIONS, seeds=[0, 1, 2, 3], guidance=Guidance(2.0))
    torch.testing.assert_close(kept, whole, atol=1e-4, rtol=1e-4)
    assert sizes == [4, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0, expected an int >= 1"),
        ({"batch_size": 2.0}, ValueError, "batch_size is 2.0, expected an int >= 1"),
        ({"quality": 3}, TypeError, "quality is no option, expected some of steps, "),
        ({"refresh": 2}, ValueError, "refresh is 2, which the family ar does not have"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        pipeline()(CAPTIONS[:1], seeds=[0], **options)


@pytest.mark.parametrize("family", ["ar", "hybrid"])
def test_the_memory_of_a_cache_is_counted_exactly(family):
    pipe = pipeline(family=family)
    states = 16 * pipe.network.config.width * 4
    more = pipe.memory_needed(6, branches=2) - pipe.memory_needed(6, branches=1)
    assert more == 6 * states + pipe.network.make_cache(6).nbytes  # six rows more
    each = pipe.memory_needed(3) - pipe.memory_needed(2)
    assert pipe.memory_needed(9) - pipe.memory_needed(3) == 6 * each
    with pytest.raises(ValueError, match="images is 0, expected at least 1"):
        pipe.memory_needed(0)
