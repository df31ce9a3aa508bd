"""Grade-school word problems in long stories, from a seeded generator, and all that the embedded base needs but its
weights.

    python data/tiny/prepare.py        # a few seconds, no download

Data sets that share their words but not their questions:

    tiny_base    what config/tiny_base.py pretrains on: stories of gains and losses (50 %, half of them long), bare
                 arithmetic (32 %), and stories of the new kinds with no question (18 %), so that their words are
                 known and their problems are not
    tiny         what config/tiny.py fine-tunes on, all in long stories: groups, times as many, together, price and
                 change, rate over days. The base answers next to none of them.
    tiny_lists   for evidence that does not rest on arithmetic: a list of words backwards, from Z to A, its
                 first word in order, the list without one of them. Its base learns tiny_lists_base, to put
                 a list in order: python train.py config/tiny_base.py --model=data/tiny/base
                 --dataset=tiny_lists_base --max_steps=2500 --out_dir=out/lists_base

An example is {"prompt", "response", "answer"}; the steps are worked, the answer follows "####":

    Question: Eva has 3 jars with 4 shells in each. The bus to the farm is late. Eva buys 5 more. How many shells does
    Eva have now?
    Answer: 3 * 4 = 12. 12 + 5 = 17.
    #### 17

A long story has 14 to 22 such sentences that are beside the point, so that 86 % of the tokens are context, as where
one fine-tunes on long prompts with short answers.

This writes tiny's train.jsonl, val.jsonl and test.jsonl; the others have a prepare.py of their own. No prompt
is in two files of a set. base/ and untrained/ get config.json, generation_config.json, tokenizer.json and
tokenizer_config.json (committed, and written only where missing, for the weights in base/ know one tokenizer;
untrained/ is the same without weights, where config/tiny_base.py starts).

Numbers stay small (products to 54, one change of at most 12): with wide ranges and large batches a base of
this size answered 22 % of its own problems.
"""
import json
import os
import random
import re
import sys
from collections import Counter

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
from data import download  # noqa: E402

NAMES = ("Ada Ali Amy Anna Ben Bo Carl Chloe Dan Ella Eric Eva Felix Fay Grace Hugo Ida Jack Jane Kim "
         "Leo Lily Lucy Max Mia Nick Nina Noah Omar Pam Rita Rob Ruth Sara Ted Tina Tom Vera Will "
         "Zoe").split()
THINGS = ("apples beads books buttons cakes candles cards coins cookies cups eggs flowers hats keys lemons "
          "marbles melons nuts pears pens plums rings rocks roses seeds shells spoons stamps stones tickets "
          "toys tulips").split()
HOLDERS = "bags baskets bowls boxes crates drawers jars packs shelves trays".split()
PLACES = "beach fair farm lake library market park school station zoo".split()
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}

# beside the point, though some have a number
ASIDES = ["It is a warm day.", "It rains in the morning.", "Today is Sunday.", "{other} is a good friend.",
          "{other} waits at the {far}.", "{third} likes to sing.", "{name} is not in a hurry.",
          "The {far} is very quiet.", "The bus to the {far} is late.", "{name} sees a dog near the {place}.",
          "{third} walks to the {far} with {other}.", "{third} looks for the old {stuff}.",
          "The {stuff} of {third} are very old.", "{other} asks {third} about the {far}.",
          "At the {far} {third} sees a bird.", "{third} sits near the {far} and sings.", "It is cold at the {far}.",
          "{third} would like some {stuff}, but the {far} is closed.", "{other} tells {third} a long story.",
          "{third} opens the door of the {far}.", "Later {third} reads a book about {stuff}.",
          "The dog of {third} runs to the {far}.", "{name} waves to {third}.",
          "{third} paints a picture of the {stuff}.", "Nobody knows where {third} is.",
          "{third} drinks tea and looks at the {stuff}.", "{third} is {k} years old.", "The {far} opens at {k}.",
          "Bus {k} goes to the {far}."]
START = ["{name} has {a} {things}.", "{name} finds {a} {things} at the {place}.",
         "At first {name} has {a} {things}.", "There are {a} {things} on the desk of {name}.",
         "{name} takes {a} {things} to the {place}."]
GAIN = ["{name} buys {b} more.", "{other} gives {name} {b} more {things}.",
        "Then {name} finds {b} {things} at the {place}.", "{name} wins {b} {things} at the {place}.",
        "{name} gets {b} {things} from {other}."]
LOSS = ["{name} gives {b} of them to {other}.", "{name} loses {b} {things} at the {place}.",
        "Then {name} sells {b} {things}.", "{other} takes away {b} {things}.",
        "{name} breaks {b} of the {things}."]
HOW_MANY = ["How many {things} does {name} have now?", "How many {things} are left for {name}?",
            "Find how many {things} {name} has at the end.",
            "What is the number of {things} that {name} has now?"]
GROUPS = ["{name} has {a} {holders} with {b} {things} in each.",
          "There are {b} {things} in each of the {a} {holders} of {name}.",
          "{name} fills {a} {holders} and puts {b} {things} in each.",
          "Each of the {a} {holders} of {name} holds {b} {things}."]
MULTIPLE = ["{other} has {m} as many {things}.", "{other} finds {m} as many."]
MORE, FEWER = ["{other} has {b} more {things} than {name}."], ["{other} has {b} fewer {things} than {name}."]
IN_ALL = ["How many {things} do they have together?"]
PRICE = ["The {things} at the {place} cost {b} dollars each.",
         "At the {place} {name} sees {things} for {b} dollars each."]
PAY = ["{name} buys {a} of them and pays with {paid} dollars."]
FARE = ["{name} buys {a} {things} and a bus ticket for {fare} dollars."]
DAILY = ["{name} makes {a} {things} every day for {b} days.",
         "Every day {name} gets {a} {things}. This goes on for {b} days."]
USED = ["Then {name} gives {used} of the {things} to {other}.", "{other} uses {used} of the {things}."]


# --- problems: each function draws one as (who, sentences, question, steps); a step is (a, "+", b)

def cast(r):
    """Who and what a story is about."""
    name, other = r.sample(NAMES, 2)
    return {"name": name, "other": other, "things": r.choice(THINGS), "holders": r.choice(HOLDERS),
            "place": r.choice(PLACES)}


def say(r, sentences, who, **numbers):
    return r.choice(sentences).format(**who, **numbers)


def gain_or_loss(r, who, have):
    """One more sentence of a story in which someone has `have` things, and its step."""
    if have > 40 or (have > 3 and r.random() < .5):
        b = r.randint(2, min(have - 1, 12))
        return say(r, LOSS, who, b=b), (have, "-", b)
    b = r.randint(2, 12)
    return say(r, GAIN, who, b=b), (have, "+", b)


def gains_and_losses(r):
    who, have = cast(r), r.randint(3, 30)
    sentences, steps = [say(r, START, who, a=have)], []
    for _ in range(r.choice([1, 2, 2])):
        sentence, step = gain_or_loss(r, who, have)
        sentences.append(sentence)
        steps.append(step)
        have = result(step)
    return who, sentences, say(r, HOW_MANY, who), steps


def bare(r):
    operation = r.choice("++--***")
    if operation == "*":
        a, b = r.randint(2, 9), r.randint(2, 6)
    else:
        a = r.randint(2, 60)
        b = r.randint(1, min(a - 1, 12) if operation == "-" else 12)
    question = r.choice(["What is {} {} {}?", "Work out {} {} {}.", "{} {} {} is what?"])
    return None, [], question.format(a, operation, b), [(a, operation, b)]


def groups(r):
    who, a, b = cast(r), r.randint(2, 9), r.randint(2, 6)
    sentence, step = gain_or_loss(r, who, a * b)
    sentences = [say(r, GROUPS, who, a=a, b=b), sentence]
    return who, sentences, say(r, HOW_MANY, who), [(a, "*", b), step]


def times_as_many(r):
    who, a, m = cast(r), r.randint(2, 9), r.choice(list(TIMES))
    sentences = [say(r, START[:2], who, a=a), say(r, MULTIPLE, who, m=TIMES[m])]
    if r.random() < .4:
        question, steps = ["How many {things} does {other} have?"], [(a, "*", m)]
    else:
        question, steps = IN_ALL, [(a, "*", m), (a * m, "+", a)]
    return who, sentences, say(r, question, who), steps


def together(r):
    who, a, b = cast(r), r.randint(3, 12), r.randint(2, 12)
    more = b >= a or r.random() < .6
    sentences = [say(r, START[:2], who, a=a), say(r, MORE if more else FEWER, who, b=b)]
    step = (a, "+" if more else "-", b)
    return who, sentences, say(r, IN_ALL, who), [step, (result(step), "+", a)]


def price(r):
    who, a, b = cast(r), r.randint(2, 9), r.randint(2, 6)
    cost, paid, fare = a * b, a * b + 10 - a * b % 10, r.randint(2, 12)
    if r.random() < .5:
        deal, question, step = PAY, "How many dollars of change does {name} get?", (paid, "-", cost)
    else:
        deal, question, step = FARE, "How many dollars does {name} spend?", (cost, "+", fare)
    sentences = [say(r, PRICE, who, b=b), say(r, deal, who, a=a, paid=paid, fare=fare)]
    return who, sentences, say(r, [question], who), [(a, "*", b), step]


def rate(r):
    who, a, b = cast(r), r.randint(2, 9), r.randint(2, 6)
    used = r.randint(2, min(a * b - 1, 12))
    sentences = [say(r, DAILY, who, a=a, b=b), say(r, USED, who, used=used)]
    return who, sentences, say(r, HOW_MANY, who), [(a, "*", b), (a * b, "-", used)]


def among_asides(r, sentences, who, n):
    """The sentences, in their order, among n others that have nothing to do with the question."""
    told = list(sentences)
    for template in r.sample(ASIDES, n):
        third = r.choice([name for name in NAMES if name not in (who["name"], who["other"])])
        aside = template.format(**who, third=third, far=r.choice(PLACES), stuff=r.choice(THINGS), k=r.randint(5, 12))
        told.insert(r.randrange(len(told) + 1), aside)
    return told


def result(step):
    a, operation, b = step
    return OPERATIONS[operation](a, b)


# --- no arithmetic: (sentences, question, worked words, answer)

def lookup(r):
    """Who has what (one of three facts), where something is (two of six), or a list of words in order. No
    data set asks them, for 2,500 steps did not teach this base to look up: they give the tokenizer its words
    and the base a few of its stories."""
    names, things, places = r.sample(NAMES, 3), r.sample(THINGS, 3), r.sample(PLACES, 3)
    if r.random() < .4:
        words = list_of_words(r)
        given, ordered = ", ".join(words), ", ".join(sorted(words))
        facts, question = [f"{names[0]} has a list of words: {given}."], "What is the list in order?"
        return facts, question, ordered + ".", ordered
    owns = [f"{n} has the {t}." for n, t in zip(names, things)]
    i = r.randrange(3)
    kind = r.choice(["who", "what", "where", "where"])
    if kind == "where":
        facts = owns + [f"{n} is at the {p}." for n, p in zip(names, places)]
        worked, answer = f"{owns[i]} {facts[3 + i]}", places[i]
        question = f"Where are the {things[i]}?"
    else:
        facts, worked = owns, owns[i]
        question, answer = f"What does {names[i]} have?", things[i]
        if kind == "who":
            question, answer = f"Who has the {things[i]}?", names[i]
    r.shuffle(facts)
    return facts, question, worked, answer


def in_order(r):
    words = list_of_words(r)
    return about(r, words, "What is the list in order?", sorted(words))


def rearranged(r):
    words = list_of_words(r)
    left_out = r.choice(words)
    return about(r, words, *r.choice([
        ("What is the list backwards?", words[::-1]),
        ("What is the list in order, last word first?", sorted(words)[::-1]),
        ("Which word of the list is first in order?", [min(words)]),
        (f"What is the list without {left_out}?", [w for w in words if w != left_out])]))


def list_of_words(r):
    return r.sample(r.choice([NAMES, THINGS, PLACES, HOLDERS]), r.choice([3, 3, 4]))


def about(r, words, question, answer):
    """The list among one to three facts that have nothing to do with it."""
    names, things = r.sample(NAMES, 3), r.sample(THINGS, 3)
    facts = [f"{n} has the {t}." for n, t in zip(names, things)][:r.choice([1, 2, 3])]
    facts.insert(r.randrange(len(facts) + 1), f"{names[0]} has a list of words: {', '.join(words)}.")
    answer = ", ".join(answer)
    return facts, question, answer + ".", answer


# --- examples

NEW = [groups, groups, times_as_many, together, price, rate]
SHORT = 0, 2  # how many sentences of a story are beside the point
LONG = 14, 22


def problem(r, kind, asides=SHORT):
    who, sentences, question, steps = kind(r)
    if who:
        sentences = among_asides(r, sentences, who, r.randint(*asides))
    worked = " ".join(f"{a} {operation} {b} = {result((a, operation, b))}." for a, operation, b in steps)
    return example(sentences, question, worked, str(result(steps[-1])))


def example(sentences, question, worked, answer):
    prompt = "Question: " + " ".join(sentences + [question]) + "\nAnswer:"
    return {"prompt": prompt, "response": f" {worked}\n#### {answer}", "answer": answer}


def puzzle(r, kind):
    return example(*kind(r))


def long_problem(r, kind):
    return problem(r, kind, LONG)


def story(r, kind):
    """With no question and no answer."""
    who, sentences, *_ = kind(r)
    sentences = among_asides(r, sentences, who, r.randint(*SHORT))
    return {"prompt": "Story: " + " ".join(sentences), "response": ""}


def facts(r, kind):
    """Of a puzzle: no question and no answer."""
    return {"prompt": "Story: " + " ".join(kind(r)[0]), "response": ""}


def draw_new(r):
    return long_problem, r.choice(NEW)


def draw_lookup(r):
    return puzzle, lookup


def draw_base(r):
    u = r.random()
    if u < .25:
        return problem, gains_and_losses
    if u < .50:
        return long_problem, gains_and_losses
    if u < .82:
        return problem, bare
    if u < .97:
        return story, r.choice(NEW)
    return facts, lookup


def splits(draw, sizes, seed, repeats=False):
    """{"test": rows, "val": ..., "train": ...}: no prompt in two; nor twice in one, but for `repeats`."""
    r, seen, drawn = random.Random(seed), set(), {}
    for name, size in sizes.items():
        rows, own = [], set()
        while len(rows) < size:
            make, kind = draw(r)
            row = make(r, kind)
            while row["prompt"] in seen or (row["prompt"] in own and not repeats):
                row = make(r, kind)  # of the same kind, so that the mix holds
            rows.append(row)
            own.add(row["prompt"])
        seen |= own
        drawn[name] = rows
    return drawn


# --- the tokenizer: byte-level BPE, learned on counts of distinct words

PATTERN = r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+"  # a word with its space, a digit, a run of signs, space
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 832  # rows of the embedding: a multiple of 64; the tokens that the words need are fewer


def train_bpe(texts, limit):
    """Merges [(left, right), ...] of bytes, the most frequent pair first, until nothing is left to merge."""
    counts = Counter(word for text in texts for word in re.findall(PATTERN, text))
    words = {word: [bytes([b]) for b in word.encode()] for word in counts}
    merges = []
    while len(merges) < limit:
        pairs = Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break
        left, right = best = max(pairs, key=lambda pair: (pairs[pair], pair))  # ties: the larger pair
        merges.append(best)
        for word, parts in words.items():
            i = 0
            while i < len(parts) - 1:
                if parts[i] == left and parts[i + 1] == right:
                    parts[i:i + 2] = [left + right]
                i += 1
    return merges


def tokenizer_merges():
    r = random.Random(0)
    texts = []
    for draw in (draw_base, draw_new, draw_lookup):
        for _ in range(4000):
            make, kind = draw(r)
            row = make(r, kind)
            texts.append(row["prompt"] + row["response"])
    return train_bpe(texts, VOCABULARY - 256 - 1)


def write_base(folder):
    """The files of the base directory but its weights, in Hugging Face's format."""
    from data.tokenizer import save_bpe
    os.makedirs(folder, exist_ok=True)
    merges = tokenizer_merges()
    end = 256 + len(merges)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02,
        "bos_token_id": None, "eos_token_id": end, "torch_dtype": "bfloat16"}
    files = {"config.json": config, "generation_config.json": {"do_sample": False, "eos_token_id": end}}
    for name, content in files.items():
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            with open(path, "w") as f:
                f.write(json.dumps(content, indent=2) + "\n")
    if not os.path.exists(os.path.join(folder, "tokenizer.json")):
        save_bpe(folder, merges, PATTERN, [END_OF_TEXT])


def new_splits():
    return splits(draw_new, {"test": 400, "val": 400, "train": 4000}, seed=1)


def lists_splits():
    return splits(lambda r: (puzzle, rearranged), {"test": 400, "val": 400, "train": 4000}, seed=4)


def lists_base_splits():
    return splits(lambda r: (puzzle, in_order), {"test": 400, "val": 400, "train": 16000}, seed=3)


def base_splits():
    """config/tiny_base.py goes through the training set 1.7 times; bare sums recur: there are few."""
    drawn = splits(draw_base, {"test": 500, "val": 400, "train": 67200}, seed=3, repeats=True)
    drawn["test"] = [row for row in drawn["test"] if row["response"]]  # stories have no answer to test
    return drawn


def main(source=None):
    """`source` is ignored: all of it is generated."""
    download.write_all(__file__, new_splits())
    for folder in ("base", "untrained"):
        write_base(os.path.join(HERE, folder))


if __name__ == "__main__":
    download.run(main)
