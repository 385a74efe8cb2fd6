"""Captions to ids and back."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CAPTIONS

from models import ClassLabels, TextTokenizer
from models.labels import load_prompt_encoder

TEXT = TextTokenizer.train(CAPTIONS, vocabulary=300, length=40)


@given(text=st.text(max_size=12))
def test_any_prompt_can_be_encoded(text):
    ids = TEXT.encode([text])
    assert ids.shape == (1, 40) and ids.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() < TEXT.vocabulary


@pytest.mark.parametrize("caption", CAPTIONS)
def test_captions_round_trip(caption):
    assert TEXT.decode(TEXT.encode([caption])) == [caption]


def test_case_and_unicode_forms_do_not_matter():
    a = TEXT.encode(["A Red CIRCLE", "a red \uff43ircle"])
    assert torch.equal(a[0], a[1]) and torch.equal(a[0], TEXT.encode(["a red circle"])[0])


def test_a_long_prompt_is_cut_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        ids = TextTokenizer(TEXT.bpe, 4).encode(["a red circle", "a tiger in 3d style on grey"])
    assert ids.shape == (2, 4)
    assert "2 of 2 captions are longer than 4 tokens" in caplog.text or "1 of 2" in caplog.text
    assert "not seen" in caplog.text and len(caplog.records) == 1


def test_the_null_condition_is_no_caption():
    null = TEXT.null_condition
    assert null.shape == (40,) and len(set(null.tolist())) == 1
    assert not torch.equal(TEXT.encode([""])[0], null)
    assert (TEXT.encode(["[NULL] [PAD]"]) != null[0]).all()  # typed by a user it is text


def test_training_twice_gives_the_same_vocabulary():
    again = TextTokenizer.train(CAPTIONS, vocabulary=300, length=40)
    assert again.bpe.to_str() == TEXT.bpe.to_str()
    other = TextTokenizer.train(["entirely different words"] * 3, vocabulary=300, length=40)
    assert torch.equal(TEXT.encode(CAPTIONS), again.encode(CAPTIONS))
    assert other.decode(other.encode(["words"])) == ["words"]


def test_saving_and_loading(tmp_path):
    TEXT.save(tmp_path / "text.json")
    loaded = TextTokenizer.load(tmp_path / "text.json")
    assert loaded.length == TEXT.length
    assert torch.equal(loaded.encode(CAPTIONS), TEXT.encode(CAPTIONS))


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="vocabulary is 100, expected at least 259"):
        TextTokenizer.train(CAPTIONS, vocabulary=100)
    with pytest.raises(ValueError, match="length is 0"):
        TextTokenizer(TEXT.bpe, 0)
    with pytest.raises(TypeError, match="expected a list of strings"):
        TEXT.encode("a red circle")
    with pytest.raises(TypeError, match="expected a list of strings"):
        TEXT.encode([3])
    with pytest.raises(FileNotFoundError, match="no text tokenizer"):
        TextTokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer file"):
        TextTokenizer.load(tmp_path / "bad.json")


def test_class_labels_are_conditions_of_length_one(tmp_path):
    labels = ClassLabels(["cat", "dog"])
    assert labels.encode(["dog", "cat"]).tolist() == [[1], [0]]
    assert labels.null_condition.tolist() == [2] and labels.vocabulary == 3 and labels.length == 1
    assert labels.decode(torch.tensor([[0], [2]])) == ["cat", ""]
    labels.save(tmp_path / "text.json")
    assert load_prompt_encoder(tmp_path / "text.json").names == ["cat", "dog"]
    TEXT.save(tmp_path / "text.json")
    assert isinstance(load_prompt_encoder(tmp_path / "text.json"), TextTokenizer)


def test_bad_class_labels_are_refused(tmp_path):
    labels = ClassLabels(["cat", "dog"])
    with pytest.raises(ValueError, match="'cow' is no class, expected one of 2: 'cat', 'dog'"):
        labels.encode(["cat", "cow"])
    with pytest.raises(TypeError, match="expected a list"):
        labels.encode("cat")
    with pytest.raises(ValueError, match="distinct names"):
        ClassLabels(["cat", "cat"])
    with pytest.raises(ValueError, match="distinct names"):
        ClassLabels([])
    (tmp_path / "text.json").write_text('{"classes": [1]}')
    with pytest.raises(ValueError, match="expected a list of names"):
        load_prompt_encoder(tmp_path / "text.json")
