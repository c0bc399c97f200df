"""Text to ids and back, and a chat to ids with a mark on those that are learnt, by the checkpoint's own chat template.

Reads and writes the files of a Hugging Face directory, by `tokenizers`, without transformers.
"""

import json
import math
import tempfile
from contextlib import contextmanager, suppress
from itertools import accumulate, chain, pairwise, takewhile
from pathlib import Path

import tokenizers

import templates
from files import read_json, resolve

MASK = "<|mask|>"
MARK = "Mark0Of0Text"  # in place of a text, it shows where a template puts that
END = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")  # ends of a turn or a text, in Qwen and Llama
ROLES = ("system", "user", "assistant", "tool")
CONFIG, SPECIAL, GENERATION = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"
TEMPLATE = "chat_template.jinja"
PUT, GROWTH = ("content", "prepend", "replacement"), 4096  # what may make texts longer, and how many times at most
SPLIT = (  # Qwen's: contractions, words, single digits, punctuation, line ends, spaces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@contextmanager
def reading(file: Path):
    """Turns whatever is raised while a file is read into a ValueError that names the file."""
    # Whatever it is, since `tokenizers` raises nothing more specific.
    try:
        yield
    except Exception as error:
        raise ValueError(f"{file} is damaged: {' '.join(str(error).split())}; fetch it again") from error


def growth(part) -> int:
    """How many times as long a part of tokenizer.json can make a text, by what it puts in place of something."""
    fields = part if isinstance(part, dict) else dict(enumerate(part)) if isinstance(part, list) else {}
    put = (len(field) for name, field in fields.items() if name in PUT and isinstance(field, str) and field)
    return math.prod([*put, *map(growth, fields.values())])


def why_invalid(messages, tools=None, *, answered: bool = False) -> str | None:
    """Why `messages` are no valid chat, or None. answered: it must end with an assistant's turn, to be learnt."""
    if tools and not named(tools):
        return "tools that are no list of named functions"
    if not isinstance(messages, list) or not messages:
        return "no messages"
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            return f"unknown role {role!r:.40}"
        if not isinstance(message.get("content"), str):
            return "content that is no string"
        if not isinstance(message.get("reasoning_content") or "", str):
            return "reasoning that is no string"
        if message.get("tool_calls") and not named(message["tool_calls"]):
            return "tool calls that are no list of named functions"
    return "no assistant turn at the end" if answered and messages[-1]["role"] != "assistant" else None


def function_of(tool) -> dict:
    """The function of a tool, or of a call of one: a field of it, or itself."""
    tool = tool if isinstance(tool, dict) else {}
    return tool["function"] if isinstance(tool.get("function"), dict) else tool


def named(tools) -> bool:
    return isinstance(tools, list) and all(isinstance(function_of(tool).get("name"), str) for tool in tools)


def reasoning(message: dict) -> str:
    """What the assistant thinks before it answers: a field, or what its content has up to </think>."""
    content = message["content"]
    inline = content.partition("</think>")[0].rpartition("<think>")[2] if "</think>" in content else ""
    return (message.get("reasoning_content") or inline).strip()


def read_files(path: Path) -> tuple[dict, str | None, dict[str, str]]:
    """(by a file's name its dict or, of the template, its text; the template; the special tokens: bos_token and so on)
    of a directory, besides tokenizer.json; ValueError, naming the file, where one is damaged."""
    files = {}
    for file in (path / name for name in (CONFIG, SPECIAL, GENERATION, TEMPLATE) if (path / name).is_file()):
        if file.name != TEMPLATE:
            files[file.name] = read_json(file)
            continue
        with reading(file), file.open("rb") as template:
            files[file.name] = template.read(templates.CHARACTERS).decode("utf-8")

    # A template is a file, or a field: a text, or a list of named ones.
    config = files.setdefault(CONFIG, {})
    with reading(path / CONFIG):
        template = config.get("chat_template")
        if isinstance(template, list):
            named = [(entry.get("name"), entry.get("template")) for entry in template if isinstance(entry, dict)]
            if len(named) < len(template) or not all(isinstance(text, str) for pair in named for text in pair):
                raise ValueError("chat_template: expected a text, or a list of objects with a name and a template")
            template = dict(named).get("default")
        if template is not None and not isinstance(template, str):
            raise ValueError(f"chat_template {template!r:.40}: expected a text")
        if not isinstance(config.setdefault("added_tokens_decoder", {}), dict):
            raise ValueError(f"added_tokens_decoder {config['added_tokens_decoder']!r:.40}: expected an object")

    # Special tokens are texts, or objects with a text as content.
    special = {}
    for name, token in {**files.get(SPECIAL, {}), **config}.items():
        token = token["content"] if isinstance(token, dict) and "content" in token else token
        if name.endswith("_token") and isinstance(token, str):
            special[name] = token
    return files, files.get(TEMPLATE) or template, special


class Tokenizer:
    """The tokenizer of a directory or a Hub id.

    mask_token: a token of the vocabulary to be the mask (default: what tokenizer_config.json names, else <|mask|>).
    `mask_added`: it was missing and got the next free id, maybe beyond the model's embedding, see convert.py.
    `mask_untrained`: no model was trained with it, as it was added, or chosen against what the files declare.
    """

    def __init__(self, path: str | Path, mask_token: str | None = None):
        path = resolve(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            way_out = "transformers writes one: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            raise FileNotFoundError(f"{path} holds no tokenizer.json; {way_out}")
        self.files, self.template, self.special = read_files(path)
        with reading(file):
            self.core = tokenizers.Tokenizer.from_file(str(file))
            parts = self.core.normalizer, self.core.pre_tokenizer, self.core.decoder
            if (times := growth([json.loads(part.__getstate__()) for part in parts if part])) > GROWTH:
                raise ValueError(f"it may make a text {times:.0e} times as long")
        self.core.no_truncation()
        self.core.no_padding()

        # The mask token, added where it is missing.
        declared = self.special.get("mask_token")
        if mask_token is not None and self.core.token_to_id(mask_token) is None:
            raise ValueError(f"mask token {mask_token!r} is not in the vocabulary; name one that is, or leave it out")
        self.mask_token = self.special["mask_token"] = mask_token or declared or MASK
        self.mask_added = self.core.token_to_id(self.mask_token) is None
        if self.mask_added:
            self.core.add_special_tokens([tokenizers.AddedToken(self.mask_token, special=True, normalized=False)])
        self.mask_ours = self.mask_added or declared == MASK  # convert.py added it, now or before
        self.mask_untrained = self.mask_added or mask_token not in (None, declared)

        # The other special tokens, as far as the files name them.
        names = ("mask_token", "eos_token", "bos_token", "pad_token")
        found = (self.core.token_to_id(self.special[name]) if name in self.special else None for name in names)
        self.mask_id, self.eos_id, self.bos_id, pad_id = found
        self.pad_id = self.eos_id if pad_id is None else pad_id

        # What ends a turn or a text: EOS, the families' end tokens, and those that generation_config.json declares.
        added = self.core.get_added_tokens_decoder()
        specials = {token.content: i for i, token in added.items() if token.special}
        more = self.files.get(GENERATION, {}).get("eos_token_id")
        more = more if isinstance(more, list) else [] if more is None else [more]
        if not all(type(i) is int for i in more):
            raise ValueError(f"{path / GENERATION}: eos_token_id {more!r:.40}: expected an id, or a list of them")
        ends = {self.eos_id, *(specials.get(token) for token in END), *(i for i in more if i in added)}
        self.end_ids = sorted(ends - {None})

    @property
    def ids(self) -> list[int]:
        """Every id of the vocabulary; a model's embedding often has more rows."""
        return list(self.core.get_vocab().values())

    @property
    def known_ids(self) -> int:
        """How many ids, from 0 on, may stand for a text: an embedding may have more rows, and the mask's is none."""
        return 1 + max(i for i in self.ids if not (self.mask_added and i == self.mask_id))

    @property
    def first_added(self) -> int:
        """The id from which on all are tokens added to the vocabulary."""
        return 1 + max(self.core.get_vocab(with_added_tokens=False).values())

    def check_mask(self) -> None:
        """Raises ValueError where the mask token has another use: it is never generated, so no answer would end."""
        for use, ids in {"end": self.end_ids, "BOS": [self.bos_id], "padding": [self.pad_id]}.items():
            if self.mask_id in ids:
                way_out = "name another with convert.py --mask_token, one that is reserved or unused"
                raise ValueError(f"the mask token {self.mask_token} is the tokenizer's {use} token; {way_out}")

    @property
    def begin_id(self) -> int:
        """The token that a text begins with: BOS, or EOS where there is no BOS."""
        begin = self.eos_id if self.bos_id is None else self.bos_id
        if begin is None:
            missing = "the tokenizer has neither BOS nor EOS"
            raise ValueError(f"generating from scratch needs a token to begin with; {missing}")
        return begin

    def fit(self, rows: int, *, mask: bool = True) -> None:
        """Raises ValueError unless an embedding of `rows` rows has one for each id (mask False: but the mask's)."""
        if mask:
            self.check_mask()
        last = max(i for i in self.ids if mask or i != self.mask_id)
        if last >= rows:
            conflict = f"the tokenizer has token id {last} and the embedding {rows} rows"
            if self.first_added <= rows:
                raise ValueError(f"{conflict}; convert.py makes the embedding larger for tokens that were added")
            raise ValueError(f"{conflict}, so they are not of one model; fetch both from one place")

    def __len__(self) -> int:
        return self.core.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Special tokens that it spells out get their ids; none is added."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair: Python read bytes that are no UTF-8
            raise ValueError(f"{ascii(text)[:60]} is no UTF-8 text; convert it, iconv -t utf-8 say") from error
        try:
            return self.core.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            # A panic of the library's, as where a regular expression of the file's gives up, is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"tokenizer.json cannot encode {ascii(text)[:60]}: {error}; fetch it again") from None

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return self.core.decode(ids, skip_special_tokens=skip_special_tokens)

    def save(self, directory: str | Path, *, mask: bool = True, answer_length: int | None = None) -> None:
        """Writes the files that were read, with the mask token in them; mask False: with none declared, and without one
        that was added, now or by an earlier conversion. answer_length: of a diffusion model, see model.Config."""
        core, files = json.loads(self.core.to_str()), json.loads(json.dumps(self.files))  # copies
        added = [token for token in core["added_tokens"] if self.mask_ours and token["id"] == self.mask_id]
        if mask:
            if answer_length is not None:
                files.setdefault(GENERATION, {})["max_new_tokens"] = answer_length
            elif GENERATION in files:  # an AR model's length is none for a canvas
                files[GENERATION].pop("max_new_tokens", None)
            # Declare it wherever special tokens are declared. tokenizer.json has it already.
            for name in files.keys() & {CONFIG, SPECIAL}:
                files[name]["mask_token"] = self.mask_token
            listed = files[CONFIG].get("added_tokens_decoder", {})
            listed |= {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added}
        else:
            # An AR checkpoint has none: a later conversion would take its row for a trained one.
            core["added_tokens"] = [token for token in core["added_tokens"] if token not in added]
            for name in files.keys() & {CONFIG, SPECIAL}:
                files[name].pop("mask_token", None)
            for token in added:
                files[CONFIG].get("added_tokens_decoder", {}).pop(str(token["id"]), None)

        # JSON, but for the template.
        Path(directory, "tokenizer.json").write_text(json.dumps(core, ensure_ascii=False), encoding="utf-8")
        for name, content in files.items():
            text = content if name == TEMPLATE else json.dumps(content, indent=2, ensure_ascii=False)
            Path(directory, name).write_text(text, encoding="utf-8")

    def render(self, messages: list[dict], *, reply=False, thinking=None, train_on="last", tools=None) -> tuple:
        """(ids, whether each is learnt) of a chat, by the checkpoint's template.

        reply: end with the prompt for the assistant's next turn (nothing is learnt then). thinking: the template's
        `enable_thinking` (default: whether the answer begins with some). tools: what the assistant may call, or None.
        train_on: the "last" assistant turn or "all", each from the end of its prompt through its end token; ValueError
        where the template rewrites earlier turns (Qwen3 drops their thinking).
        """
        if train_on not in ("last", "all"):
            raise ValueError(f"train_on {train_on!r}: expected last or all")
        if reply:
            ids = self.encode(self.fill(messages, reply=True, thinking=bool(thinking), tools=tools))
            return ids, [False] * len(ids)
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError("the messages do not end with an assistant turn; nothing in them is learnt")

        # The ids of a turn lie between two borders. Where a token spans a border, the parts are encoded one by one: in
        # sampling the prompt is encoded alone, too.
        whole, borders = self._borders(messages, train_on, thinking, tools)
        parts = [self.encode(whole[a:b]) for a, b in pairwise([0, *borders])]
        ids, sizes, together = list(chain(*parts)), list(accumulate(map(len, parts))), self.core.encode(whole)
        if ids != together.ids:
            # Or does the tokenizer mark the beginning of every text? The borders by the first difference tell soonest.
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, together.ids)))
            first, found = together.offsets[min(same, len(together.ids) - 1)][0], {}
            for border in sorted(borders, key=lambda border: abs(border - first)):
                prefix = self.encode(whole[:border])
                found[border] = len(prefix)
                if together.ids[: len(prefix)] != prefix:
                    break
            else:
                ids, sizes = together.ids, [found[border] for border in borders]
        supervised = [False] * len(ids)
        for begin, end in zip(sizes[::2], sizes[1::2]):
            supervised[begin:end] = [True] * (end - begin)
        return ids, supervised

    def _borders(self, messages: list[dict], train_on: str, thinking: bool | None, tools) -> tuple[str, list[int]]:
        """The chat as text, and where in it each learnt turn's prompt ends, and the turn itself."""
        mode = bool(reasoning(messages[-1])) if thinking is None else thinking
        whole, last = self.text(messages, thinking=mode, tools=tools), len(messages) - 1

        def turn(before: list[dict], chat: list[dict], at: int) -> list[int] | None:
            """The borders of the last turn of `chat`, which follows `before`; the text of that ends at `at` in the
            whole. None where the whole has it otherwise."""
            base = self.text(before, thinking=mode, tools=tools) if before else ""
            text = whole if chat is messages else self.text(before + chat, thinking=mode, tools=tools)
            options = {"thinking": bool(reasoning(chat[-1])) if thinking is None else thinking, "tools": tools}
            prompt = self.fill(before + chat[:-1], reply=True, **options)
            if not (text.startswith(base) and prompt.startswith(base)):
                return None
            text, prompt = text[len(base) :], prompt[len(base) :]
            if not whole.startswith(text, at) or whole.startswith(prompt, at):
                return [at + len(prompt), at + len(text)] if whole.startswith(text, at) else None

            # A prompt that ends in <think>, say, for an answer without: they share what comes before, by tokens.
            question = self.fill(before + chat[:-1], reply=False, **options)[len(base) :]
            ending, begin = prompt.removeprefix(question), at + len(question)
            if ending == prompt or not whole.startswith(question, at):
                return None
            shared = [end for _, end in self.core.encode(ending).offsets if whole.startswith(ending[:end], begin)]
            return [begin + max(shared, default=0), at + len(text)]

        # Templates seldom look far back. So that a long chat is not rendered from its beginning for every turn, a turn
        # follows the exchange before it alone, and only where this does not give the text of the whole, all turns.
        borders, system = [], list(takewhile(lambda message: message["role"] == "system", messages))
        user, before, done = None, None, 0
        for i, message in enumerate(messages):
            user = message if message["role"] == "user" else user
            if message["role"] != "assistant" or (i < last and train_on == "last"):
                continue
            found = None
            with suppress(ValueError):
                found = turn(before, messages[done : i + 1], borders[-1]) if before else None
            found = found or turn([], messages if i == last else messages[: i + 1], 0)
            if not found:
                way_out = "; train on the last turn only" if i < last else ""
                raise ValueError(f"the chat template renders turn {i + 1} otherwise inside the whole chat{way_out}")
            borders, done = borders + found, i + 1
            before = user and [*system, user, message]
        return whole, [*borders[:-1], len(whole)]

    def text(self, messages: list[dict], *, thinking: bool, tools=None) -> str:
        """The chat as text, with the thinking that its last turn begins with, if the template drops that too."""

        def filled(content: str) -> str:
            chat = [*messages[:-1], messages[-1] | {"content": content}]
            return self.fill(chat, reply=False, thinking=thinking, tools=tools)

        # As DeepSeek-R1's does: then it gives what is around the turn's content.
        answer = messages[-1]["content"]
        if "</think>" in answer and MARK not in filled(answer.replace("</think>", f"{MARK}</think>", 1)):
            return filled(MARK).replace(MARK, answer)
        return filled(answer)

    def fill(self, messages: list[dict], *, reply: bool, thinking: bool, tools: list[dict] | None = None) -> str:
        """The chat as text; ValueError where there is no template, or it fails."""
        if self.template is None:
            raise ValueError("the tokenizer has no chat template; use plain text (--stage pt, --chat_template False)")
        options = {"add_generation_prompt": reply, "enable_thinking": thinking, "tools": tools, **self.special}
        try:
            return templates.render(self.template, {"messages": messages, **options})
        except ValueError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    @classmethod
    def train(cls, texts, vocab_size: int, template: str = CHATML) -> "Tokenizer":
        """A byte-level BPE trained on `texts` (an iterable of str), at most `vocab_size` tokens and a mask token.

        The same texts give the same tokenizer. End of text is <|endoftext|>, end of turn <|im_end|>.
        """
        texts, special = list(texts), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        smallest = len(special) + 256
        if vocab_size < smallest:
            raise ValueError(f"vocab_size {vocab_size}: bytes and special tokens alone are {smallest}")

        # What is split first is never merged: digits, and words with the space before them.
        core = tokenizers.Tokenizer(tokenizers.models.BPE())
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated")
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
        core.decoder = tokenizers.decoders.ByteLevel()

        # A merge needs several occurrences, so that no token is learnt from one text alone.
        options = {"vocab_size": vocab_size, "min_frequency": max(2, len(texts) // 100), "special_tokens": special}
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False, **options)
        core.train_from_iterator(texts, trainer)

        # Written and read again, so that it is made in one way only.
        config = {"bos_token": special[0], "pad_token": special[0], "eos_token": special[2], "chat_template": template}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        with tempfile.TemporaryDirectory() as directory:
            core.save(str(Path(directory, "tokenizer.json")))
            Path(directory, CONFIG).write_text(json.dumps(config))
            return cls(directory)
