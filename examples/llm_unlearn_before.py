"""A loop as in arXiv 2310.10683: gradient ascent, random mismatch, and KL to the untrained model.

`llm_unlearn_before.py` is plain PyTorch, `llm_unlearn_after.py` the same loop on fastforget; a diff shows what changes.
Forget rows are prompts with harmful answers, retain rows ordinary questions with good ones: JSON lines of "prompt" and
"response". The paper has facebook/opt-1.3b, PKU-SafeRLHF and TruthfulQA. Answers alone are labelled, both sets are
shuffled and cycled by themselves, and the loop ends once the forget answers are unlikely.

python FILE MODEL FORGET RETAIN OUT      (a folder or hub name; two JSONL files; a folder for the adapter)
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor

STEPS, BATCH_SIZE, LEARNING_RATE, MAX_LENGTH = 5, 2, 1e-3, 96
MISMATCHES = 2  # answers of other prompts, for each forget prompt
MAX_FORGET_NLL = 20.0

Row = dict[str, str]
Batch = dict[str, Tensor]


def read_rows(path: str) -> list[Row]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def endless(rows: list[Row], seed: int) -> Iterator[list[Row]]:
    """Batches of rows, shuffled anew in each pass."""
    shuffled = random.Random(seed)
    while True:
        order = shuffled.sample(rows, len(rows))
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            yield order[start : start + BATCH_SIZE]


def encode(rows: list[Row], tokenizer: transformers.PreTrainedTokenizerBase) -> Batch:
    """Questions and answers, of which the answers are labelled; padded on the right."""
    sequences, labels = [], []
    for row in rows:
        question = tokenizer(f"### Question: {row['prompt']}\n### Answer: ")["input_ids"]
        answer = tokenizer(row["response"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        sequences.append(torch.tensor(question + answer)[:MAX_LENGTH])
        labels.append(torch.tensor([-100] * len(question) + answer)[:MAX_LENGTH])
    padded = [torch.ones_like(sequence) for sequence in sequences]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(sequences, batch_first=True, padding_value=tokenizer.pad_token_id),
        "attention_mask": pad(padded, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def main(name: str, forget_path: str, retain_path: str, out: str) -> list[float]:
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    base = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])).train()
    reference = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    forget_rows, retain_rows = read_rows(forget_path), read_rows(retain_path)
    answers, losses = random.Random(2), []
    for _, harmful, normal in zip(range(STEPS), endless(forget_rows, 0), endless(retain_rows, 1), strict=False):
        others = answers.choices(retain_rows, k=MISMATCHES * len(harmful))
        asked = [row for row in harmful for _ in range(MISMATCHES)]
        pairs = [{**row, "response": other["response"]} for row, other in zip(asked, others, strict=True)]
        forget, mismatch, retain = (encode(rows, tokenizer) for rows in (harmful, pairs, normal))
        labelled = retain["labels"][:, 1:] != -100
        with torch.no_grad():
            target = reference(**retain).logits[:, :-1][labelled].log_softmax(-1)
        log_probs = model(**retain).logits[:, :-1][labelled].log_softmax(-1)
        kl = torch.nn.functional.kl_div(log_probs, target, log_target=True, reduction="batchmean")
        forget_nll = model(**forget).loss
        loss = -0.5 * forget_nll + model(**mismatch).loss + kl
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"loss {losses[-1]:.4f}, forget NLL {forget_nll.item():.3f}")
        if forget_nll > MAX_FORGET_NLL:
            break
    model.save_pretrained(out)
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
