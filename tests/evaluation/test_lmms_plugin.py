"""The plug-in against a copy of the interface that lmms-eval gives its models."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import small_vlm
import torch
from PIL import Image

from nemovl_train.convert.hf_export import export_canonical
from nemovl_train.inference.answer import Decoding, answer
from nemovl_train.inference.sampling import Sampling

QUESTION = "what is this?"


@pytest.fixture
def lmms_eval(monkeypatch):
    """The three names that a model imports, as `lmms_eval/api` defines them."""
    registry: dict[str, type] = {}

    class Lmms:
        def __init__(self) -> None:
            self.task_dict: dict = {}

    def register_model(*names):
        return lambda cls: registry.update(dict.fromkeys(names, cls)) or cls

    modules = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.api.registry": {"register_model": register_model},
    }
    for name, values in modules.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    # As lmms-eval finds it: the table of the plug-in, then the module and class that it names.
    plugin = "nemovl_train.evaluation.lmms_plugin"
    table = importlib.import_module(f"{plugin}.models").AVAILABLE_MODELS
    for name, cls in table.items():
        module = importlib.import_module(f"{plugin}.models.{name}")
        assert registry[name] is getattr(module, cls)
    return registry


def test_answers_are_those_of_generate(lmms_eval, tmp_path: Path):
    torch.set_num_threads(1)
    tokenizer = small_vlm.write_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / "hf"
    weights = small_vlm.weights().items()
    export_canonical(weights, small_vlm.CONFIG, folder, kind="vlm", tokenizer=tokenizer, card={})
    (tmp_path / "0.png").write_bytes(small_vlm.picture(4))
    greedy, drawn = Decoding(max_new_tokens=5), Sampling(temperature=1.5, top_p=0.9, seed=2)
    expected = [
        answer(folder, QUESTION, images=[tmp_path / "0.png"], decoding=greedy),
        answer(folder, QUESTION, decoding=greedy),
        answer(folder, QUESTION, decoding=Decoding(max_new_tokens=5, sampling=drawn)),
    ]
    model = lmms_eval["nemovl"](pretrained=str(folder), batch_size="2", seed=2, device="cuda:0")
    try:
        pictures = [[Image.open(tmp_path / "0.png")], [], None]
        model.task_dict = {"task": {"test": pictures}}
        options = [
            {"max_new_tokens": 5},
            {"max_new_tokens": 5},
            {"max_new_tokens": 5, "temperature": 1.5, "top_p": 0.9},
        ]
        requests = [
            types.SimpleNamespace(args=(QUESTION, options[i], lambda doc: doc, i, "task", "test")) for i in range(3)
        ]
        assert model.generate_until(requests) == expected
        half = expected[1][: len(expected[1]) // 2 + 1]
        requests[1].args[1]["until"] = [half[-1]]
        assert model.generate_until(requests[1:2]) == [expected[1][: expected[1].index(half[-1])]]
        with pytest.raises(NotImplementedError, match="generate_until"):
            model.loglikelihood([])
    finally:
        model._open.close()
