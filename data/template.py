"""A checkpoint's own chat template: what a server would send to the model. It is a Jinja program of somebody
else's, so it is rendered in Jinja's sandbox, and its result is only ever compared, or taken as the text of a
system prompt.

    load(path, settings) -> Template or None    .render(messages) -> text, .default_system() -> text
"""
import json
import os

TODAY = "<today>"  # what strftime_now gives: a text with a date in it is another one tomorrow


class TemplateError(Exception):
    """A template that cannot be rendered: why."""


class Template:
    """source: the Jinja program; names: {"bos_token": text, ...}, what it may call special tokens."""

    def __init__(self, source, names):
        self.source, self.names, self.compiled = source, names, None

    def render(self, messages, generate=False):
        """messages: [{"role", "content"}]; generate: up to where an answer begins. TemplateError: it cannot
        be."""
        try:
            self.compiled = self.compiled or compile_template(self.source)
            return self.compiled.render(messages=messages, add_generation_prompt=generate, **self.names)
        except Exception as e:  # a program of somebody else's may raise whatever it likes
            raise TemplateError(f"{type(e).__name__}: {' '.join(str(e).split())[:160]}") from e

    def default_system(self):
        """The system prompt that it puts before a conversation without one, in ChatML (SmolLM2, Qwen2); "" if
        there is none, or one that says the date."""
        try:
            text = self.render([dict(role="user", content="hi")], generate=True)
        except TemplateError:
            return ""
        start, end = "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\nhi<|im_end|>"
        before, _, rest = text.partition(start)
        system, found, _ = rest.partition(end)
        return system if found and "<|" not in before + system and TODAY not in system else ""


def load(path, settings):
    """The Template of a checkpoint: chat_template.jinja, or that of tokenizer_config.json (settings); None if
    it has none."""
    source, file = settings.get("chat_template"), os.path.join(path, "chat_template.jinja")
    if os.path.exists(file):
        with open(file, encoding="utf-8", errors="replace") as f:
            source = f.read()
    if isinstance(source, list):  # several, by name
        source = next((t.get("template") for t in source if t.get("name") == "default"), None)
    names = {key: token_text(value) for key, value in settings.items() if key.endswith("_token")}
    return Template(source, {k: v for k, v in names.items() if isinstance(v, str)}) if source else None


def token_text(token):
    """A special token's text, as settings have it: the text itself, or an object that holds it, or None."""
    if isinstance(token, dict):
        return token.get("content")
    return token


def compile_template(source):
    """In a sandbox, with what transformers' templates may use and nothing else."""
    import jinja2.ext
    import jinja2.sandbox

    if tuple(map(int, jinja2.__version__.split(".")[:3])) < (3, 1, 6):
        raise TemplateError("its sandbox is known to leak: pip install -U jinja2")

    class Names(jinja2.utils.Namespace):
        def __init__(*args, **kw):
            if any(name.startswith("_") for name in kw):
                raise jinja2.exceptions.SecurityError("a private name")
            jinja2.utils.Namespace.__init__(args[0], **kw)

        def __setitem__(self, name, value):
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError("a private name")
            super().__setitem__(name, value)

    class Generation(jinja2.ext.Extension):  # {% generation %} marks what is scored; here it is its text
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    box = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    box.globals = {"range": box.globals["range"], "dict": lambda *args, **kw: dict(*args, **kw),
                   "namespace": Names, "raise_exception": refuse, "strftime_now": lambda form: TODAY}
    box.filters["tojson"] = lambda x, ensure_ascii=False, **kw: json.dumps(x, ensure_ascii=ensure_ascii, **kw)
    return box.from_string(source)
