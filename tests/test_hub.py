"""A repository of the hub is read as a folder is, and its card says what its readers must know."""

import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from tiny import FAMILIES, network, pipeline

import models.folders
import tokenizers_vq.cards
import tokenizers_vq.hub
from models import TextToImage, TokenTransformer
from tokenizers_vq import Facts, VQTokenizer
from tokenizers_vq.hub import WEIGHTS, save_part
from unicfg import Guidance

FACTS = Facts(
    data="Drawn by `unicfg`.", licence="cc0-1.0", recipe="steps: 3", numbers="97 %", limits="Small."
)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Repositories as folders; no network is asked."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/{commit_message}")

    def snapshot(name, **options):
        if not (root / name).is_dir():
            missing = SimpleNamespace(headers={}, request=None)
            raise RepositoryNotFoundError("no such repository", response=missing)
        asked.append(options)
        patterns = options.get("allow_patterns", ["*"])
        found = tmp_path / "cache" / f"{name.replace('/', '--')}-{len(asked)}"
        for file in (root / name).rglob("*"):
            inside = file.relative_to(root / name)
            if file.is_file() and any(fnmatch(str(inside), own) for own in patterns):
                (found / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, found / inside)
        return str(found)

    asked: list[dict] = []
    monkeypatch.setattr(tokenizers_vq.cards, "HfApi", Api)
    monkeypatch.setattr(tokenizers_vq.hub, "snapshot_download", snapshot)
    monkeypatch.setattr(models.folders, "snapshot_download", snapshot)
    monkeypatch.setattr(
        models.folders,
        "hf_hub_download",
        lambda name, file, token=None: str(Path(snapshot(name)) / file),
    )
    return root


def test_a_pipeline_goes_there_and_back_with_all_its_families(hub, tmp_path):
    ar = TextToImage.from_pretrained("shapes", "ar")
    flow = TextToImage.from_pretrained("shapes", "flow")
    options = {"guidance": Guidance(3.0), "seeds": [0]}
    address = ar.push_to_hub("me/shapes", FACTS, dtype=torch.int8, private=True)
    assert address == "https://hub/me/shapes/Upload weights and card"
    flow.push_to_hub(
        "me/shapes", FACTS, dtype=torch.int8, prompts=["a red circle", "two small blue squares"]
    )
    assert models.folders.held_families("me/shapes") == ["ar", "flow"]
    for pipe in (ar, flow):
        again = TextToImage.from_pretrained("me/shapes", pipe.family)
        images = [p(["a red circle"], **options)[0].tobytes() for p in (pipe, again)]
        assert images[0] == images[1]  # shipped weights are such integers already
    card = ModelCard.load(hub / "me/shapes/README.md")
    assert card.data.license == "cc0-1.0" and card.data.pipeline_tag == "text-to-image"
    for text in ("Drawn by", "97 %", "steps: 3", "Small.", "a red circle", "seeds 0 to 7"):
        assert text in card.text
    from PIL import Image

    with Image.open(hub / "me/shapes/samples.png") as grid:
        side = images and flow(["a red circle"], **options)[0].width
        assert grid.size == (8 * side, 2 * side)
        first = flow(["a red circle"], **options)[0]
        assert grid.crop((0, 0, side, side)).tobytes() == first.tobytes()


def test_of_a_repository_only_the_family_that_is_asked_for_is_read(hub, tmp_path, monkeypatch):
    for family in ("ar", "flow"):
        pipeline(family=family).push_to_hub("me/mine", FACTS)
    (hub / "me/mine/flow" / WEIGHTS).write_bytes(b"broken, and not asked for")
    asked, download = [], models.folders.snapshot_download

    def watched(name, **options):
        asked.append(options)
        return download(name, **options)

    monkeypatch.setattr(models.folders, "snapshot_download", watched)
    pipe = TextToImage.from_pretrained("me/mine", "ar", revision="v1", token="secret")
    assert pipe.family == "ar"
    ((revision, token),) = [(own["revision"], own["token"]) for own in asked]
    assert (revision, token) == ("v1", "secret")
    assert not any("flow" in own or "*/" in own for own in asked[0]["allow_patterns"])


def test_a_folder_has_a_card_where_there_is_something_to_say(tmp_path):
    pipe = TextToImage.from_pretrained("shapes", "flow")
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    pipe.save_pretrained(tmp_path, facts=FACTS)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "cc0-1.0" and f"# {tmp_path.name}" in card.text
    assert "Drawn by" in card.text and str(tmp_path) in card.text
    pipe.save_pretrained(tmp_path)  # the card stays
    assert "Drawn by" in (tmp_path / "README.md").read_text()


def test_parts_by_themselves(hub, tmp_path):
    pipe = TextToImage.from_pretrained("shapes", "ar")
    for part, kind in ((pipe.tokenizer, VQTokenizer), (pipe.network, TokenTransformer)):
        part.push_to_hub("me/part", FACTS)
        again = kind.from_pretrained("me/part")
        for own, other in zip(part.parameters(), again.parameters(), strict=True):
            assert torch.equal(own, other)
        card = (hub / "me/part/README.md").read_text()
        assert "from_pretrained('me/part')" in card and kind.__name__ in card
        assert "license: cc0-1.0" in card and "Drawn by" in card
        part.save_pretrained(tmp_path / kind.__name__)
        assert "nothing was said" in (tmp_path / kind.__name__ / "README.md").read_text()
        # a card that is there is left alone, unless there is something to say
        (tmp_path / kind.__name__ / "README.md").write_text("mine")
        part.save_pretrained(tmp_path / kind.__name__)
        assert (tmp_path / kind.__name__ / "README.md").read_text() == "mine"
        part.save_pretrained(tmp_path / kind.__name__, FACTS)
        assert "Drawn by" in (tmp_path / kind.__name__ / "README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_network_is_read_without_drawing_one_into_memory_of_its_own(tmp_path, family, dtype):
    model = network(family)
    save_part(model, tmp_path, dtype)
    state = torch.get_rng_state()
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    for file in tmp_path.iterdir():  # a file that is changed in its place reaches no loaded model
        file.write_bytes(bytes(file.stat().st_size))
    assert not again.training and all(own.requires_grad for own in again.parameters())
    assert {own.device.type for own in (*again.parameters(), *again.buffers())} == {"cpu"}
    for name, own in again.state_dict().items():
        expected = model.state_dict()[name]
        assert own.dtype == expected.dtype, name
        assert torch.equal(own, expected.to(dtype).to(expected.dtype)), name


def test_a_card_without_data_or_licence_is_refused():
    for data, licence, name in (("", "mit", "data"), ("drawn", " ", "licence")):
        with pytest.raises(ValueError, match=f"{name} is empty"):
            Facts(data=data, licence=licence)


def test_what_cannot_be_drawn_leaves_no_repository(hub):
    pipe = TextToImage.from_pretrained("shapes", "ar")
    with pytest.raises(ValueError, match="branch"):
        from unicfg.guidance import branches

        guidance = Guidance(branches.negative(2.0, 1.0))
        pipe.push_to_hub("me/none", FACTS, prompts=["a red circle"], guidance=guidance)
    assert not (hub / "me").exists()


def test_families_of_another_tokenizer_do_not_share_a_repository(hub):
    TextToImage.from_pretrained("shapes", "ar").push_to_hub("me/shapes", FACTS)
    before = (hub / "me/shapes/tokenizer/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"me/shapes holds ar with another text\.json"):
        TextToImage.from_pretrained("emoji", "ar").push_to_hub("me/shapes", FACTS)
    assert (hub / "me/shapes/tokenizer/model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="repo_id is 'shapes', expected an owner and a name"):
        TextToImage.from_pretrained("shapes", "ar").push_to_hub("shapes", FACTS)
