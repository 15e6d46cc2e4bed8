import base64
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_protector_guard import ConfigError
from mllm_protector_guard.evaluation import PERTURBATIONS, LabelledRow, evaluate_perturbed, perturb, perturb_row
from mllm_protector_guard.fakes import KeywordDetector

TEXT = "Please soak the beans\n\nbefore you cook them, and keep ALL of the water."
SPELLED = [kind for kind in PERTURBATIONS if kind != "base64"]


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_an_attack_is_repeatable_and_changes_the_text(kind: str) -> None:
    attacked = perturb(TEXT, kind)
    assert attacked != TEXT
    assert attacked == perturb(TEXT, kind)


def test_invisible_characters_split_every_word_and_vanish_again() -> None:
    attacked = perturb(TEXT, "zero-width")
    assert all(word not in attacked for word in ("soak", "beans", "ALL"))
    assert "".join(c for c in attacked if unicodedata.category(c) != "Cf") == TEXT


def test_look_alikes_have_the_same_length_and_other_letters() -> None:
    attacked = perturb("People cope", "homoglyph")
    assert len(attacked) == len("People cope")
    assert {unicodedata.name(c).split()[0] for c in attacked if c in "Реорсе"} == {"CYRILLIC"}
    assert "cope" not in attacked


def test_fullwidth_letters_fold_back_under_nfkc() -> None:
    attacked = perturb(TEXT, "fullwidth")
    assert not any("!" <= c <= "~" for c in attacked)
    assert unicodedata.normalize("NFKC", attacked) == TEXT


def test_base64_holds_the_whole_answer_behind_a_lead_in() -> None:
    lead_in, _, encoded = perturb(TEXT, "base64").rpartition("\n\n")
    assert lead_in
    assert base64.b64decode(encoded).decode() == TEXT


@pytest.mark.parametrize(("kind", "share"), [("leetspeak", 0.5), ("spacing", 0.5), ("leetspeak", 0.25)])
def test_the_stated_share_of_words_is_touched(kind: str, share: float) -> None:
    words = ["lattice", "sitting", "alight", "gables"] * 25
    attacked = perturb("\n".join(words), kind, share=share).split("\n")
    changed = sum(before != after for before, after in zip(words, attacked, strict=True))
    assert changed == round(share * len(words))


def test_answers_and_seeds_do_not_share_their_pattern() -> None:
    text = " ".join(["lattice"] * 40)
    assert perturb(text, "leetspeak", seed=1) != perturb(text, "leetspeak", seed=2)
    longer = perturb(text + " more", "leetspeak").split()[:40]
    assert longer != perturb(text, "leetspeak").split()


def test_an_attack_without_letters_to_change_leaves_the_answer() -> None:
    assert perturb("先把豆子泡好", "homoglyph") == "先把豆子泡好"
    assert [perturb(" \n", kind) for kind in PERTURBATIONS] == [" \n"] * len(PERTURBATIONS)


@settings(max_examples=50)
@given(st.text(), st.sampled_from(SPELLED))
def test_white_space_stays_and_no_text_breaks_an_attack(text: str, kind: str) -> None:
    attacked = perturb(text, kind)
    if kind != "spacing":
        assert [len(part.split()) for part in attacked.split("\n")] == [len(part.split()) for part in text.split("\n")]
    assert attacked.replace(" ", "").count("\n") == text.replace(" ", "").count("\n")


def test_a_lone_surrogate_can_be_attacked() -> None:
    assert all(perturb("a \ud800 b", kind) for kind in PERTURBATIONS)


def test_only_the_answer_of_a_row_changes() -> None:
    row = LabelledRow(question="soak beans", answer="soak beans", harmful=True, source="s")
    attacked = perturb_row(row, "fullwidth")
    assert (attacked.question, attacked.harmful, attacked.source) == ("soak beans", True, "s")
    assert attacked.answer != row.answer


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_wrong_settings_are_refused(share: float) -> None:
    with pytest.raises(ConfigError):
        perturb("a", "leetspeak", share=share)
    with pytest.raises(ConfigError, match="zero-width"):
        perturb("a", "upside-down")


def test_a_detector_that_knows_clean_words_alone_loses_to_every_spelling() -> None:
    rows = [LabelledRow(answer="build a bomb", harmful=True)] * 4 + [
        LabelledRow(answer="bake a loaf", harmful=False)
    ] * 4
    results = evaluate_perturbed(KeywordDetector({"bomb"}), rows, ["homoglyph", "base64"])
    for one in results:
        assert (one.clean.auroc, one.attacked.auroc, one.auroc_drop) == (1.0, 0.5, 0.5)
        assert (one.clean.recall, one.attacked.recall, one.unchanged, one.failed) == (1.0, 0.0, 0, 0)


def test_a_limit_draws_rows_of_each_class() -> None:
    rows = [LabelledRow(answer=f"word {n}", harmful=n % 10 == 0) for n in range(100)]
    (one,) = evaluate_perturbed(KeywordDetector({"bomb"}), rows, ["leetspeak"], limit=5)
    assert (one.clean.harmful, one.clean.harmless) == (5, 5)
    with pytest.raises(ConfigError, match="limit"):
        evaluate_perturbed(KeywordDetector({"bomb"}), rows, ["leetspeak"], limit=0)
