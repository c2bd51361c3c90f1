"""The suites of `fastforget evaluate`: each reads its data, and measures one model at a time.

What a suite returns of a model is JSON: "figures" by name (None where one cannot be had, with a reason under
NAME_reason), "samples" of what it wrote, and "log", which the same suite of another model is compared with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

from fastforget.data.asked import read_questions
from fastforget.data.chat import RowReader
from fastforget.data.examples import Example
from fastforget.data.questions import Question, question_row
from fastforget.data.sources import Source, read_source
from fastforget.errors import FastforgetError
from fastforget.evaluate.evaluators import Dialogue, Evaluator, check_score, load_evaluator
from fastforget.evaluate.generation import Progress, continue_greedily, decode
from fastforget.evaluate.harm import harm_report, reduction
from fastforget.evaluate.label_tokens import LabelTokens, label_tokens
from fastforget.evaluate.leakage import fluency
from fastforget.evaluate.membership import MembershipScores, membership_aucs, membership_scores
from fastforget.evaluate.muse import knowmem, min_k_auc, muse_report, read_retain_auc, verbmem
from fastforget.evaluate.nearness import nearest, text_states
from fastforget.evaluate.overlap import bleu
from fastforget.evaluate.questions import answers_of, ask, whole_example
from fastforget.evaluate.tofu import UTILITY_SETS, mean, ratios, read_retain_ratios, tofu_report
from fastforget.head import context_length
from fastforget.jobs.evaluation_options import EvaluateOptions
from fastforget.jobs.select import dialogues_of
from fastforget.models import load_base, usable_device

BATCH = 16  # dialogues evaluated at once
SAMPLES = 4  # outputs of each set that the report shows
Result = dict[str, Any]


class Suite(Protocol):
    """A suite whose data is read."""

    def measure(self, model: Any, progress: Progress) -> Result:
        """Measure one model."""
        ...

    def compare(self, before: Result, after: Result) -> dict[str, Any]:
        """Return the figures that two models have together."""
        ...


class TofuSuite:
    """TOFU: forget and retain questions, and those about real authors and world facts (arXiv 2401.06121)."""

    def __init__(self, options: EvaluateOptions, tokenizer: Any) -> None:
        self.options, self.tokenizer = options, tokenizer
        sources = {name: options.source(name, "tofu") for name in ("forget", *UTILITY_SETS)}
        self.questions = {name: questions_of(source, options) for name, source in sources.items() if source is not None}
        self.retained = None if options.retain_log is None else read_retain_ratios(options.retain_log)

    def measure(self, model: Any, progress: Progress) -> Result:
        answers = {
            name: ask(model, self.tokenizer, part, chat_template=self.options.chat_template, progress=progress)
            for name, part in self.questions.items()
        }
        report = tofu_report(answers, self.retained)
        outputs = {name: [each.output for each in part] for name, part in answers.items()}
        blues = {
            f"{name}_bleu": bleu([each.answer for each in part], outputs[name]) for name, part in self.questions.items()
        }
        found = asdict(report)
        return {
            "figures": {**found.pop("figures"), **blues, **found},
            "samples": [
                sample(name, each.question, each.answer, output)
                for name, part in self.questions.items()
                for each, output in list(zip(part, outputs[name], strict=True))[:SAMPLES]
            ],
            "log": {"forget_truth_ratio": ratios(answers["forget"])},
        }

    def compare(self, before: Result, after: Result) -> dict[str, Any]:
        return {}


class MuseSuite:
    """MUSE (arXiv 2407.06460): --forget and --set holdout=... texts, --set verbmem=, forget_qa= and retain_qa=."""

    def __init__(self, options: EvaluateOptions, tokenizer: Any) -> None:
        self.options, self.tokenizer = options, tokenizer
        self.texts = {
            name: texts_of(options.source(name, "muse"), tokenizer, options) for name in ("forget", "holdout")
        }
        pairs = options.source("verbmem", "muse-verbmem")
        rows = [] if pairs is None else itertools.islice(dialogues_of(pairs), options.measured_passages)
        self.pairs = [(row["prompt"], row["response"]) for row in rows]  # whole, and as they stand: not as examples
        self.questions = {
            name: questions_of(options.source(name, "muse-knowmem"), options) for name in ("forget_qa", "retain_qa")
        }
        self.retained = None if options.retain_log is None else read_retain_auc(str(options.retain_log))

    def measure(self, model: Any, progress: Progress) -> Result:
        chat = self.options.chat_template
        known = [
            knowmem(model, self.tokenizer, part, chat_template=chat, progress=progress)
            for part in self.questions.values()
        ]
        verbatim = verbmem(model, self.tokenizer, self.pairs, progress=progress)
        auc = min_k_auc(model, self.texts["forget"], self.texts["holdout"], progress=progress)
        report = muse_report(verbatim, (known[0], known[1]), auc, self.retained)
        return {"figures": asdict(report), "samples": [], "log": {"auc": auc}}

    def compare(self, before: Result, after: Result) -> dict[str, Any]:
        return {}


class MembershipSuite:
    """Membership inference: --forget texts that the model was trained on, and --unseen ones that it was not."""

    def __init__(self, options: EvaluateOptions, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.texts = {
            name: texts_of(options.source(name, options.format_of(name)), tokenizer, options)
            for name in ("forget", "unseen")
        }
        if not self.texts["unseen"]:
            raise FastforgetError("--suite membership needs --unseen: texts that no model here was trained on")
        examples = [*self.texts["forget"], *self.texts["unseen"]]
        self.references: list[LabelTokens | None] = [None] * len(examples)
        if options.reference is not None:
            model = load_base(str(options.reference), options.bits, usable_device(options.device))
            self.references = label_tokens(model, examples)

    def measure(self, model: Any, progress: Progress) -> Result:
        examples = [*self.texts["forget"], *self.texts["unseen"]]
        found = label_tokens(model, examples, moments=True, progress=progress)
        members = len(self.texts["forget"])
        scores: list[list[MembershipScores]] = [[], []]
        for place, (example, tokens, reference) in enumerate(zip(examples, found, self.references, strict=True)):
            if tokens is not None:
                text = decode(self.tokenizer, example.input_ids)
                scores[place >= members].append(membership_scores(tokens, text, reference))
        return {
            "figures": {f"{name}_auc": auc for name, auc in membership_aucs(*scores).items()},
            "samples": [],
            "log": {},
        }

    def compare(self, before: Result, after: Result) -> dict[str, Any]:
        return {}


class HarmSuite:
    """Harm: both models answer the prompts of --forget, and --evaluator says which answers are undesired."""

    def __init__(self, options: EvaluateOptions, tokenizer: Any) -> None:
        if options.evaluator is None:
            raise FastforgetError("--suite harm needs --evaluator: what says which answers are harmful")
        self.options, self.tokenizer = options, tokenizer
        firsts: dict[str, Example] = {}  # of each row: a later piece of a long response has its beginning as prompt
        for each in texts_of(options.source("forget", options.format), tokenizer, options):
            firsts.setdefault(each.source, each)
        prompts = [each.input_ids[: each.prompt_length] for each in firsts.values() if each.prompt_length > 0]
        self.prompts = list(dict.fromkeys(prompts))
        if not self.prompts:
            raise FastforgetError("--suite harm needs prompts: give rows with prompt and response")
        self.evaluator: Evaluator = load_evaluator(
            options.evaluator,
            labels=options.label_names,
            judge_prompt=options.judge_prompt,
            bits=options.bits,
            device=options.device,
        )

    def measure(self, model: Any, progress: Progress) -> Result:
        outputs = continue_greedily(model, self.tokenizer, self.prompts, progress=progress)
        asked = [decode(self.tokenizer, prompt) for prompt in self.prompts]
        dialogues = [Dialogue(*each) for each in zip(asked, outputs, strict=True)]
        scores = [
            score
            for start in range(0, len(dialogues), BATCH)
            for score in self.evaluator(dialogues[start : start + BATCH])
        ]
        for each, value in zip(dialogues, scores, strict=True):
            check_score(value, f"the answer to {each.prompt[-60:]!r}")
        own = fluency(model, self.tokenizer, self.prompts, outputs)
        report = harm_report(outputs, scores, self.options.threshold, own)
        samples = [sample("forget", each.prompt, "", each.response) for each in dialogues[:SAMPLES]]
        return {"figures": asdict(report), "samples": samples, "log": {}}

    def compare(self, before: Result, after: Result) -> dict[str, Any]:
        value, reason = reduction(before["figures"]["flagged"], after["figures"]["flagged"])
        return {"reduction": value, "reduction_reason": reason}


class HallucinationSuite:
    """Hallucination: whether answers to the questions of --forget are nearer to a wrong than to the right answer."""

    def __init__(self, options: EvaluateOptions, tokenizer: Any) -> None:
        self.options, self.tokenizer = options, tokenizer
        asked = questions_of(options.source("forget", options.format or "halueval"), options)
        self.questions = [each for each in asked if each.perturbed]
        if not self.questions:
            raise FastforgetError("--suite hallucination needs questions with wrong answers (halueval, truthfulqa)")

    def measure(self, model: Any, progress: Progress) -> Result:
        context = context_length(model) or 2**20
        reader = RowReader(self.tokenizer, context, chat_template=self.options.chat_template)
        firsts = [whole_example(reader, each, each.answer) for each in self.questions]
        prompts = [each.input_ids[: each.prompt_length] for each in firsts]
        outputs = continue_greedily(model, self.tokenizer, prompts, progress=progress)
        found = []
        with model.disable_adapter():
            for question, output in zip(self.questions, outputs, strict=True):
                examples = [whole_example(reader, question, text) for text in answers_of(question)]
                if output.strip():  # the first piece of it, where it is longer than the context
                    row = question_row(question.question, output.strip(), chat=reader.use_template)
                    examples.append(reader.examples(row, question.source)[0])
                states = text_states(model, examples)
                right, wrong = states[:2], states[2 : 2 + len(question.perturbed)]
                found.append(nearest(right, wrong, states[-1] if output.strip() else None))
        judged = [float(each) for each in found if each is not None]
        answers = [each.answer for each in self.questions]
        pairs = zip(self.questions, outputs, strict=True)
        return {
            "figures": {
                "hallucinated": mean(judged),
                "not_answered": 1.0 - len(judged) / len(found),
                "bleu": bleu(answers, outputs),
            },
            "samples": [sample("forget", each.question, each.answer, output) for each, output in list(pairs)[:SAMPLES]],
            "log": {},
        }

    def compare(self, before: Result, after: Result) -> dict[str, Any]:
        return {}


SUITES: dict[str, Callable[[EvaluateOptions, Any], Suite]] = {
    "tofu": TofuSuite,
    "muse": MuseSuite,
    "membership": MembershipSuite,
    "harm": HarmSuite,
    "hallucination": HallucinationSuite,
}


def sample(name: str, prompt: str, truth: str, output: str) -> dict[str, str]:
    """Make one row of the samples."""
    return {"set": name, "prompt": prompt, "truth": truth, "output": output}


def questions_of(source: Source | None, options: EvaluateOptions) -> list[Question]:
    """Read a set's questions, as many as are measured; none of no set."""
    return [] if source is None else read_questions(source)[: options.measured_passages]


def texts_of(source: Source | None, tokenizer: Any, options: EvaluateOptions) -> list[Example]:
    """Read a set's texts, as many as are measured; none of no set."""
    return (
        [] if source is None else list(read_source(source, tokenizer, options.max_length))[: options.measured_passages]
    )
