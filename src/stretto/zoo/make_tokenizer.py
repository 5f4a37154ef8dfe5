"""Remakes the tokenizer of the zoo from the workbook's own training text: byte-level BPE, 2048 ids, single digits.

    python -m stretto.zoo.make_tokenizer [DIRECTORY]
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from stretto.zoo.workbook import TOKENIZER, stream

SIZE = 2048
SPECIALS = [
    "<|endoftext|>", "<|pad|>", "<|mask|>", "<|im_start|>", "<|im_end|>", "<|fork|>", "<|join|>", "<|thread|>",
    "<|/thread|>", "<Parallel>", "</Parallel>", "<Goal>", "</Goal>", "<Outline>", "</Outline>", "<Path>",
    "</Path>", "<Conclusion>", "</Conclusion>", *(f"<|slot_{i}|>" for i in range(16)),
]
TEMPLATE = (
    "{%- if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train(examples: int = 40_000) -> Tokenizer:
    """The tokenizer; specials come first, the rest of the 2048 ids are bytes, merges and, if needed, spares."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    spares = [f"<|spare_{i}|>" for i in range(32)]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=SPECIALS + spares, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=2,
    )
    texts = (f"user\n{e.prompt}\nassistant\n{e.answer}\n" for e in islice(stream("train", 0), examples))
    tok.train_from_iterator(texts, trainer)
    missing = SIZE - tok.get_vocab_size()
    tok.add_special_tokens([AddedToken(f"<|spare_{32 + i}|>", special=True) for i in range(missing)])
    return tok


def save(tok: Tokenizer, folder: Path) -> None:
    """Write the files that Hugging Face loaders read."""
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|pad|>",
        "mask_token": "<|mask|>", "bos_token": None, "clean_up_tokenization_spaces": False,
        "model_max_length": 1024, "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    special = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "mask_token": "<|mask|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)


if __name__ == "__main__":
    save(train(), Path(sys.argv[1]) if len(sys.argv) > 1 else TOKENIZER.parent)
