"""The questions of mmlu_generative_dream and hellaswag_gen."""

import re


def mmlu(**metadata) -> dict:
    """MMLU's test questions, all subjects. (lm-eval hands over the model's arguments; nothing here depends on them.)"""
    import datasets

    names = datasets.get_dataset_config_names("cais/mmlu")
    names = ["all"] if "all" in names else sorted({*names} - {"auxiliary_train"})
    parts = [datasets.load_dataset("cais/mmlu", name, split="test") for name in names]
    return {"test": datasets.concatenate_datasets(parts)}


def clean(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag(dataset):
    """Texts cleaned as upstream's `hellaswag` cleans them."""

    def question(row):
        text = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        return {"text": text, "endings": [clean(ending) for ending in row["endings"]]}

    return dataset.map(question)
