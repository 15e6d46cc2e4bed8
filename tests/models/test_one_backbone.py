"""A detector and a detoxifier on the same base share its weights, and score and write as they do alone."""

import shutil
import threading
import weakref

import pytest
import torch

from mllm_protector_guard import Turn, load_detector, load_detoxifier
from mllm_protector_guard.models.layout import lay_out_by_column
from mllm_protector_guard.models.sharing import CorrectedLinear
from models.tiny import save_detector, save_detoxifier

TURN = Turn(question="How do I get even?", answer="Break into his house and wait for him there.")


@pytest.fixture
def folders(detector_folder, chat_lm, tmp_path):
    """A detector, and a detoxifier with another adapter; nobody else has loaded either, nor their base."""
    base = shutil.copytree(chat_lm, tmp_path / "base")
    detector = shutil.copytree(detector_folder, tmp_path / "detector")
    config = detector / "guard.json"
    config.write_text(config.read_text().replace(str(chat_lm), str(base)))
    return detector, save_detoxifier(tmp_path / "detoxifier", base, max_new_tokens=24, adapter={"seed": 9})


def both(folders, **placement):
    """The detector, and the detoxifier that was loaded beside it."""
    detector, detoxifier = load_detector(folders[0], **placement), load_detoxifier(folders[1], **placement)
    detector.warm_up()
    detoxifier.warm_up()
    return detector, detoxifier


def alone(folders, **placement):
    """A detoxifier that was loaded while no detector was in memory."""
    detoxifier = load_detoxifier(folders[1], seed=1, **placement)
    detoxifier.warm_up()
    return detoxifier


def parameters(detector, detoxifier):
    """Of both models, by the decoder's names."""
    mine, theirs = detector._ready().pooled.backbone, detoxifier._ready().model.model
    return dict(mine.named_parameters()), dict(theirs.named_parameters())


def logits(detoxifier):
    loaded = detoxifier._ready()
    with torch.inference_mode():
        return loaded.model(torch.tensor([detoxifier._prompt(TURN, loaded)])).logits


def test_the_decoder_is_there_once(folders):
    mine, theirs = parameters(*both(folders, device="cpu"))
    assert all(weight.data_ptr() == theirs[name].data_ptr() for name, weight in mine.items())


def test_the_detoxifier_computes_what_it_does_alone(folders):
    plain = alone(folders, device="cpu")
    beside, detoxifier = both(folders, device="cpu")
    assert beside._ready().held is not None
    assert any(isinstance(module, CorrectedLinear) for module in detoxifier._ready().model.modules())
    assert not any(isinstance(module, CorrectedLinear) for module in plain._ready().model.modules())
    torch.testing.assert_close(logits(detoxifier), logits(plain), atol=1e-4, rtol=1e-5)
    assert detoxifier.rewrite([TURN, TURN]) == plain.rewrite([TURN, TURN])
    assert (
        detoxifier._ready().model.generation_config.eos_token_id == plain._ready().model.generation_config.eos_token_id
    )


def test_the_detectors_scores_do_not_move(folders):
    detector = load_detector(folders[0], device="cpu")
    before = detector.score([TURN])
    load_detoxifier(folders[1], device="cpu").rewrite([TURN])
    assert detector.score([TURN]) == before


def test_they_run_at_the_same_time(folders):
    detector, detoxifier = both(folders, device="cpu")
    score, text = detector.score([TURN]), detoxifier.rewrite([TURN])
    scores, texts = [], []
    threads = [
        threading.Thread(target=lambda: scores.extend(detector.score([TURN])[0] for _ in range(20))),
        threading.Thread(target=lambda: texts.extend(detoxifier.rewrite([TURN])[0] for _ in range(5))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == score * 20
    assert texts == text * 5


def test_either_outlives_the_other(folders):
    detector, detoxifier = both(folders, device="cpu")
    text, gone = detoxifier.rewrite([TURN]), weakref.ref(detector._ready().held)
    del detector
    assert gone() is None
    assert detoxifier.rewrite([TURN]) == text


def test_a_detoxifier_that_came_first_keeps_its_own(folders):
    plain = alone(folders, device="cpu")
    detector = load_detector(folders[0], device="cpu")
    detector.warm_up()
    mine, theirs = parameters(detector, plain)
    assert not any(weight.data_ptr() == theirs[name].data_ptr() for name, weight in mine.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_weights_are_not_shared(folders, dtype):
    mine, theirs = parameters(*both(folders, device="cpu", dtype=dtype))
    assert not any(weight.data_ptr() == theirs[name].data_ptr() for name, weight in mine.items())


def test_another_number_format_is_not_shared(folders):
    detector = load_detector(folders[0], device="cpu")
    detector.warm_up()
    detoxifier = load_detoxifier(folders[1], device="cpu", dtype="bfloat16")
    assert detoxifier._ready().model.dtype == torch.bfloat16


@pytest.mark.parametrize(("detectors", "detoxifiers"), [({"use_dora": True}, {}), ({}, {"use_dora": True})])
def test_an_adapter_that_is_more_than_a_product_is_not_shared(detectors, detoxifiers, chat_lm, tmp_path):
    one = save_detector(tmp_path / "one", chat_lm, adapter=detectors)
    other = save_detoxifier(tmp_path / "other", chat_lm, adapter=detoxifiers)
    mine, theirs = parameters(*both((one, other), device="cpu"))
    assert not any(weight.data_ptr() == theirs[name].data_ptr() for name, weight in mine.items())


def test_matrices_lie_by_column_and_keep_their_values():
    model = torch.nn.Sequential(torch.nn.Embedding(7, 5), torch.nn.Linear(5, 3))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    lay_out_by_column(model)
    pointers = [weight.data_ptr() for weight in model.parameters()]
    lay_out_by_column(model)
    assert pointers == [weight.data_ptr() for weight in model.parameters()]
    assert all(weight.t().is_contiguous() for weight in model.parameters() if weight.dim() == 2)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_other_number_formats_lie_as_they_did():
    model = torch.nn.Linear(5, 3, dtype=torch.bfloat16)
    lay_out_by_column(model)
    assert model.weight.is_contiguous()
