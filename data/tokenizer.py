"""Text to token ids and back (work in progress: save_bpe stands, load follows)."""
import json
import os

def byte_alphabet():
    """The printable character that Hugging Face's byte-level vocabularies write for each byte: [str] * 256."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]            # these stand for themselves
    hidden = [b for b in range(256) if b not in shown]                       # the others move to 256, 257, ...
    return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]


def save_bpe(path, merges, pattern, special_tokens):
    """Write a byte-level BPE as the directory `path` would hold it on the hub: tokenizer.json, tokenizer_config.json.

    merges: [(bytes, bytes)] in order; pattern: the regex that cuts text into pieces (it has to match every character);
    special_tokens: [str], the first is the end of text. Ids: the 256 bytes, then one a merge, then the special tokens.
    transformers reads it as PreTrainedTokenizerFast, we read it with `load`."""
    alphabet = byte_alphabet()
    spell = lambda token: "".join(alphabet[b] for b in token)
    tokens = [spell([b]) for b in range(256)] + [spell(a + b) for a, b in merges]
    assert len(set(tokens)) == len(tokens), "two merges make the same token"
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    split = dict(type="Split", pattern=dict(Regex=pattern), behavior="Isolated", invert=False)
    state = dict(version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None, decoder=byte_level,
                 added_tokens=[dict(id=len(tokens) + i, content=t, **flags) for i, t in enumerate(special_tokens)],
                 pre_tokenizer=dict(type="Sequence", pretokenizers=[split, byte_level]),
                 model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                            end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=False,
                            vocab={t: i for i, t in enumerate(tokens)}, merges=[[spell(a), spell(b)] for a, b in merges]))
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=special_tokens[0],
                    clean_up_tokenization_spaces=False)
    os.makedirs(path, exist_ok=True)
    for name, content in (("tokenizer.json", state), ("tokenizer_config.json", settings)):
        with open(os.path.join(path, name), "w", encoding="utf-8") as f:
            json.dump(content, f, ensure_ascii=False, indent=1)
