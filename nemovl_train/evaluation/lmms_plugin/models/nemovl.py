"""An exported folder as a model of lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval, `lmms_eval/api/model.py`).

Imported by lmms-eval alone: nothing else here needs that package.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model

from nemovl_train.evaluation.metrics import scored_answer
from nemovl_train.exceptions import UserError
from nemovl_train.inference.answer import Asked, Decoding, ExportedModel, read_medium
from nemovl_train.inference.sampling import GREEDY, Sampling


@register_model("nemovl")
class Nemovl(lmms):
    """One process, one device; requests are answered in batches.

    Args:
        pretrained: Exported folder.
        batch_size: Requests that are answered together.
        think: Turn reasoning on; tasks see what follows the trace.
        video_pruning_rate: Share of each video's visual tokens to drop.
        seed: Seed of the draws, for tasks that ask for a temperature.
        unused: Further arguments that lmms-eval gives every model, such as the device.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 8,
        think: bool = False,
        video_pruning_rate: float = 0.0,
        seed: int = 0,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.exported = ExportedModel(Path(pretrained))
        self.batch_size = int(batch_size)
        self.think, self.video_pruning_rate, self.seed = bool(think), float(video_pruning_rate), int(seed)
        self._open = ExitStack()
        self._loaded = self._open.enter_context(self.exported.loaded())

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the order of the requests."""
        answers: list[str] = []
        # Neighbours that want the same options share a batch.
        for options, run in itertools.groupby(requests, key=lambda request: dict(request.args[1])):
            for batch in itertools.batched(run, self.batch_size):
                answers += self._answers([self._asked(request) for request in batch], options)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: tasks of this family are answered by generation."""
        raise NotImplementedError("nemovl answers by generation; choose tasks with output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("nemovl answers single questions; choose tasks with output_type generate_until")

    def _answers(self, asked: Sequence[Asked], options: Mapping[str, Any]) -> list[str]:
        temperature = float(options.get("temperature") or 0.0)
        sampled = Sampling(temperature=temperature, top_p=float(options.get("top_p") or 1.0), seed=self.seed)
        decoding = Decoding(
            max_new_tokens=int(options.get("max_new_tokens", 1024)),
            sampling=sampled if temperature else GREEDY,
            video_pruning_rate=self.video_pruning_rate,
        )
        until = options.get("until") or []
        texts = [scored_answer(text) for text in self.exported.answers(self._loaded, asked, decoding)]
        return [_cut(text, [until] if isinstance(until, str) else until) for text in texts]

    def _asked(self, request: Any) -> Asked:
        context, _, doc_to_visual, doc_id, task, split = request.args
        items: list[dict[str, Any]] = []
        media: dict[str, bytes] = {}
        for number, visual in enumerate(doc_to_visual(self.task_dict[task][split][doc_id]) or []):
            kind, data, metadata = _medium(visual)
            media[f"medium{number}"] = data
            items.append({"type": kind, kind: f"medium{number}", "metadata": metadata})
        text = {"type": "text", "text": context.replace("<image>", ""), "literal": True}
        messages = [{"role": "system", "content": "/think"}] if self.think else []
        messages.append({"role": "user", "content": [*items, text]})  # type: ignore[dict-item]
        return self.exported.asked({"id": f"{task}-{doc_id}", "messages": messages}, media)


def _medium(visual: Any) -> tuple[str, bytes, dict[str, Any]]:
    """A picture of Pillow's or the path of a video, as kind, bytes and metadata."""
    if isinstance(visual, str):
        return "video", *read_medium("video", Path(visual))
    if not hasattr(visual, "save"):
        raise UserError(f"the task shows a {type(visual).__name__}; only pictures and video files can be seen")
    out = io.BytesIO()
    visual.convert("RGB").save(out, "PNG")
    return "image", out.getvalue(), {}


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the strings that end an answer."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text
