"""What is said before a run begins, of data and a checkpoint that do not fit together. Each is a list of
sentences, empty where all is well.

    warnings(examples, tokenized, tokenizer, prompt_format, max_positions)   of the data
    untrained(tokenizer, prompt_format, embed, head)                        of the weights
    stops(tokenizer, prompt_format)                                          of what serves the adapter
"""
import os
import re
from collections import Counter

import torch

import data
from data.template import TemplateError

# A row that no training has moved: below this share of the usual norm (zero, or as good as), or of the usual
# distance from the mean of all rows (there new tokens are put; Qwen2's rarest special tokens have .2, its
# <|im_end|> .35)
SMALL, NEAR = .25, .1


def warnings(examples, tokenized, tokenizer, prompt_format, max_positions=None):
    """examples, tokenized: of the training set. max_positions: ModelConfig's, None: unknown."""
    longest = max((len(t.tokens) for t in tokenized), default=0)
    long = [f"{sum(len(t.tokens) > max_positions for t in tokenized):,} texts are longer than the "
            f"{max_positions:,} tokens that the model was made for (max_position_embeddings; the longest has "
            f"{longest:,}): lower max_seq_len"] if max_positions and longest > max_positions else []
    return difference(examples, tokenizer, prompt_format) + special_text(examples, tokenizer) + long


def special_text(examples, tokenizer):
    """Rows that hold special tokens as text, which is trained as ordinary characters."""
    found, rows = Counter(), 0
    for e in examples:
        texts = [e.system or "", *(text for turn in e.history for text in turn), e.prompt, e.response]
        seen = {token for text in texts for token in tokenizer.lookalikes(text)}
        rows += bool(seen)
        found.update(seen)
    if not rows:
        return []
    names = [name for name, _ in found.most_common()]
    formats = [f for f in data.ENDS if needed(f) & found.keys() and needed(f) <= tokenizer.special.keys()]
    remedy = f"give bare texts and --prompt_format={formats[0]}" if formats else "take it out of the texts"
    return [f"{rows:,} rows hold the text of {', '.join(names[:4])}, trained as ordinary characters, "
            f"not as special tokens: {remedy} (an end-of-text token follows every answer anyway)"]


def difference(examples, tokenizer, prompt_format):
    """Where rows are other texts than the checkpoint's own template makes of them: the first such place."""
    if tokenizer.template is None:
        return []
    try:
        found = first_difference(examples, tokenizer, prompt_format)
        if not found:
            return []
        others = [f for f in data.ENDS if f != prompt_format and needed(f) <= tokenizer.special.keys()]
        better = [f"use --prompt_format={f}" for f in others if not first_difference(examples, tokenizer, f)]
    except TemplateError as e:
        return [f"the checkpoint's own chat template cannot be rendered ({e}) and compared with "
                f"prompt_format = {prompt_format}: see to it that what is served is what was trained"]
    remedy = (better or ["give the rows that text, or serve the model with the format's"])[0]
    return [f"prompt_format = {prompt_format} and the checkpoint's own chat template differ, and a server "
            f"that uses the template asks otherwise than was trained: a row reads {found[0]!r} where the "
            f"template has {found[1]!r}; {remedy}"]


def first_difference(examples, tokenizer, prompt_format):
    """(a row's text, the template's) from a little before their first difference on, None if there is none.
    Probes of literal pieces stand for all shapes that the examples have: with a system prompt, an empty one
    or none, with earlier turns or none, with white space at their ends or none. TemplateError: it cannot be
    rendered."""
    edged = lambda text: text != text.strip()
    shapes = {(e.system and "system prompt", bool(e.history), edged(e.prompt) or edged(e.response))
              for e in examples if e.response}
    for system, history, spaces in sorted(shapes, key=str):
        text = (lambda name: f" {name}\n") if spaces else str
        turns = [(text("first question"), text("first answer"))] * history
        turns.append((text("question"), text("answer")))
        probe = data.Example(*turns[-1], history=tuple(turns[:-1]), system=system)
        messages = [] if system is None else [dict(role="system", content=system)]
        for turn in turns:
            messages += [dict(role=role, content=t) for role, t in zip(("user", "assistant"), turn)]
        asked = tokenizer.decode(data.prompt_ids(probe, tokenizer, prompt_format))
        whole = tokenizer.decode(data.encode(probe, tokenizer, 10**6, prompt_format).tokens)
        request = tokenizer.template.render(messages[:-1], generate=True)
        row = tokenizer.template.render(messages)
        if row.startswith(whole):
            row = whole + row[len(whole):].strip()  # a template goes on with a line break
        for ours, theirs in ((asked, request), (whole, row)):
            if ours != theirs:
                n = len(os.path.commonprefix([ours, theirs]))
                return ours[max(0, n - 20):n + 40], theirs[max(0, n - 20):n + 40]


def needed(prompt_format):
    """{text} of the special tokens in a format."""
    return set(re.findall(r"<\|\w+\|>", data.FORMATS[prompt_format]("", "")))


def untrained(tokenizer, prompt_format, embed, head):
    """Tokens of the format that no training has moved: a frozen model neither knows nor emits them. embed,
    head (V, D); a row is told by its norm, or by its distance from the mean of all, where new tokens are
    put."""
    ids = {tokenizer.special[name] for name in needed(prompt_format)}
    end, found = data.end_token(tokenizer, prompt_format), []
    for weight, wanted, what in ((embed, ids - {tokenizer.bos}, "embedding"), (head, {end}, "head")):
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        some = weight[::max(1, len(weight) // 4096)].float()
        for centre, share in ((torch.zeros_like(some[0]), SMALL), (some.mean(0), NEAR)):
            usual = (some - centre).norm(dim=1).median()
            low = [i for i in sorted(wanted) if (weight[i].float() - centre).norm() <= share * usual]
            found += [(tokenizer.decode([i], first=False), what) for i in low]
    if not found:
        return []
    names = ", ".join(dict.fromkeys(name for name, _ in found))
    parts = " and the ".join(dict.fromkeys(what for _, what in found))
    return [f"{names}: rows of the {parts} are zero or nearly, as of tokens that were never trained, and "
            "LoRA does not change them, so answers may never end: take the instruct model, or "
            "--prompt_format=alpaca"]


def stops(tokenizer, prompt_format):
    """What a server of the adapter has to be told: its base ends answers with another token."""
    end = data.end_token(tokenizer, prompt_format)
    if end in tokenizer.eos:
        return []
    return [f"answers end with {tokenizer.decode([end], first=False)} (id {end}), which is not an "
            f"eos_token_id of the base: tell what serves the adapter (vLLM: stop_token_ids=[{end}]); "
            "tools.export writes it into the merge"]
