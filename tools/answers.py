"""What a generated text answers, read as LLM-Adapters (arXiv 2304.01933) reads it, so that numbers compare.

    a number          the one after "####" (data.stated_number), or the last one, right within 1e-3
    an option word    the first of true, false / answer1 ... 5 / solution1, 2 / ending1 ... 4 / option1, 2
    a letter (AQuA)   the first capital A to E, which may be the A of "After": stated_letter() reads better
    a function        HumanEval: the program that runs its tests
"""
import math
import re

import data


def first(pattern, text):
    found = re.search(pattern, text)
    return found[0] if found else ""


def stated_letter(text):
    """The letter of the first "#### C", or else of the last "The answer is (C)" or "answer: C"."""
    letter = r"\s*\(?([A-E])\b"
    found = re.findall("####" + letter, text)[:1] or re.findall("[Aa]nswer(?: is)?:?" + letter, text)
    return found[-1] if found else ""


def judge(text, answer):
    """(what the text answers, whether that is right). The form of the true answer decides how."""
    true, word = data.number(answer), re.fullmatch(r"(answer|solution|option|ending)\d", answer)
    if true is not None:
        said = data.stated_number(text)
        return said, said is not None and abs(said - true) <= 1e-3
    if re.fullmatch("[A-E]", answer):
        said = first("[A-E]", text)
    elif answer in ("true", "false"):
        said = first("true|false", text)
    elif word:
        said = first(word[1] + "[1-5]", text)
    else:  # free text: words are compared
        return text, data.is_correct(text, answer)
    return said, said == answer


def program(prompt, text, name, test):
    """The program that tests what was generated for a HumanEval prompt: a function body that goes on with it, up
    to the first line that is not indented, or a fenced block. What the prompt imports and defines stays."""
    goes_on = re.match(r"([ \t]*\n)*[ \t]+\S", text)
    block = None if goes_on else re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    code = block[1] if block else text
    if not goes_on and re.search(rf"^def {name}\(", code, re.MULTILINE):
        body = prompt[:prompt.rfind(f"def {name}(")] + code
    else:
        body = prompt + re.split(r"\n(?=[^\s)\]}])", "\n" + code, maxsplit=1)[0][1:]
    return f"{body}\n{test}\ncheck({name})\n"


def wilson(right, n, z=1.959964):
    """95 % interval of a share."""
    p, c = right / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + c / (4 * n))
    return max(0.0, (p + c / 2 - half) / (1 + c)), min(1.0, (p + c / 2 + half) / (1 + c))
