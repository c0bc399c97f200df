"""Evaluation: what lm-eval is told and hears, the tasks in tasks/, manifests and their table."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN

pytest.importorskip("lm_eval", reason="needs lm-eval[math]==0.4.13")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

import evaluate
import report
from checkpoint import load_model, save_model
from diffusion import Sampling
from likelihood import log_likelihood
from options import flags
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """The golden qwen3 as ar, mdlm and bd3lm, directories."""
    made = {}
    for objective in ("ar", "mdlm", "bd3lm"):
        path = tmp_path_factory.mktemp("checkpoints") / objective
        model = load_model(GOLDEN / "models" / "qwen3")
        tokenizer = Tokenizer(GOLDEN / "models" / "qwen3")
        model.config.objective = objective
        if objective != "ar":
            model.config.mask_token_id = tokenizer.mask_id
        if objective == "bd3lm":
            model.config.block_length = 4
        save_model(model, path, tokenizer=tokenizer)
        made[objective] = str(path)
    return made


def test_lm_evals_own_models_are_known_beside_ours():
    code = "import evaluate; evaluate.models(); from lm_eval.api import registry; registry.get_model('dummy')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def lm(checkpoints, objective: str, batch_size=4, **model_args):
    return evaluate.models()[f"a2d_{objective}"](batch_size=batch_size, pretrained=checkpoints[objective], **model_args)


def words(n: int, seed: int = 0) -> str:
    return " ".join(
        f"w{i}" for i in torch.randint(0, 500, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    )


def requests(kind: str, arguments: list[tuple], task: str = "t") -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=(task, i, 1))
        for i, args in enumerate(arguments)
    ]


PAIRS = [(words(n, n), " " + words(m, 50 + m)) for n, m in [(3, 1), (9, 3), (9, 3), (1, 5), (6, 2)]]
OBJECTIVES = ["ar", "mdlm", "bd3lm"]


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loglikelihood_is_diffusions_in_any_batch(checkpoints, objective):
    expected = None
    for batch_size in (1, 3, "auto"):
        model = lm(checkpoints, objective, batch_size, mc_num=16)
        found = model.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
        expected = expected or found
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    tokenizer = model.tokenizer
    contexts, continuations = ([tokenizer.encode(text) for text in side] for side in zip(*PAIRS))
    generator = torch.Generator().manual_seed(42)
    estimate, error = log_likelihood(model.model, contexts, continuations, draws=16, generator=generator)
    assert [value for value, _ in found] == pytest.approx(estimate.tolist(), abs=1e-3)
    assert [row["error"] for row in model.standard_errors] == pytest.approx(error.tolist(), abs=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_empty_contexts_and_continuations_are_scored_as_lm_evals_own_models_do(checkpoints, objective):
    model = lm(checkpoints, objective, mc_num=16)
    pairs = [("", "w1 w2"), ("w1", ""), ("", "")]
    (first, _), second, third = model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    prefix = [[model.prefix_token_id]]
    generator = torch.Generator().manual_seed(42)
    assert first == pytest.approx(
        log_likelihood(model.model, prefix, [[1, 2]], draws=16, generator=generator)[0].item()
    )
    assert second[0] == third[0] == 0
    prefix = model.tokenizer.decode(prefix[0], skip_special_tokens=False)
    ((again, _),) = model.loglikelihood(requests("loglikelihood", [("", prefix + "w1 w2")]), disable_tqdm=True)
    assert again == pytest.approx(first)  # it has begun already


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_long_contexts_are_cut_on_the_left_and_hopeless_requests_refused(checkpoints, objective):
    model = lm(checkpoints, objective, max_length=8, mc_num=16)
    room = 8 + (objective == "ar")
    context, continuation = words(20, 1), " " + words(3, 2)
    cut = " ".join(context.split()[-(room - 3) :])
    a, b = model.loglikelihood(requests("loglikelihood", [(context, continuation), (cut, continuation)]), True)
    assert a[0] == pytest.approx(b[0], abs=1e-4)
    ids, generator = [model.tok_encode(text) for text in (cut, continuation)], torch.Generator().manual_seed(42)
    exact, _ = log_likelihood(model.model, *([each] for each in ids), draws=16, generator=generator)
    assert len(ids[0]) + len(ids[1]) == room and a[0] == pytest.approx(exact.item(), abs=1e-4)
    with pytest.raises(ValueError, match="leaves no room"):
        model.loglikelihood(requests("loglikelihood", [("w1", " " + words(12))]), True)
    with pytest.raises(ValueError, match="leaves no room"):
        model.generate_until(requests("generate_until", [("w1", {"until": [], "max_gen_toks": 8})]), True)
    answers = model.generate_until(requests("generate_until", [(context, {"until": [], "max_gen_toks": 4})]), True)
    assert answers == model.generate_until(
        requests("generate_until", [(" ".join(context.split()[-4:]), {"until": [], "max_gen_toks": 4})]), True
    )


def test_rolling_is_the_sum_over_windows_and_ar_without_windows_is_the_whole_text(checkpoints):
    text = words(13, 5)
    whole = lm(checkpoints, "ar")
    (value,) = whole.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), True)
    ids = whole.tokenizer.encode(text)
    exact, _ = log_likelihood(whole.model, [[whole.prefix_token_id]], [ids])
    assert value == pytest.approx(exact.item(), abs=1e-4)
    for objective in OBJECTIVES:
        model = lm(checkpoints, objective, max_length=6, mc_num=16)
        short, empty = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,), ("",)]), True)
        assert short < 0 and empty == 0
        assert len(model.standard_errors) == 2


def test_the_errors_of_a_texts_windows_add_up_as_independent_ones_do(checkpoints, monkeypatch):
    model = lm(checkpoints, "mdlm", max_length=6)
    monkeypatch.setattr(
        model, "_loglikelihood_tokens", lambda windows, **_: [(-1.0, 3.0 + i, False) for i in range(len(windows))]
    )
    model.loglikelihood_rolling(requests("loglikelihood_rolling", [(words(8),)]), True)
    (row,) = model.standard_errors
    assert (row["log_likelihood"], row["error"]) == (-2, 5)


def test_greedy_verdicts_on_request(checkpoints):
    context = words(5, 3)
    for objective in OBJECTIVES:
        model = lm(checkpoints, objective, is_check_greedy=True, mc_num=4, block_size=None)
        gen = {"until": [], "max_gen_toks": 3}
        # as the verdict decodes: one block, the whole answer
        arguments = {} if objective == "ar" else {"block_size": 4 if objective == "bd3lm" else 64}
        answer = lm(checkpoints, objective, **arguments).generate_until(
            requests("generate_until", [(context, gen)]), True
        )
        pairs = [(context, " " + answer[0]), (context, " w7 w8 w9")]
        verdicts = [greedy for _, greedy in model.loglikelihood(requests("loglikelihood", pairs), True)]
        assert verdicts == [True, False]


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_answers_do_not_depend_on_the_batch_and_end_at_a_stop_string(checkpoints, objective):
    prompts = [words(n, n) for n in (5, 2, 9, 5, 1)]
    gen = {"until": [], "max_gen_toks": 12}
    single = lm(checkpoints, objective, 1).generate_until(requests("generate_until", [(p, gen) for p in prompts]), True)
    for batch_size in (2, "auto"):
        model = lm(checkpoints, objective, batch_size)
        assert model.generate_until(requests("generate_until", [(p, gen) for p in prompts]), True) == single
    assert 0 < model.counts["generated", "tokens"] <= 5 * 12 and model.counts["generated", "forwards"] > 0
    stop = single[0].split()[3]
    for until in (stop, [stop, "never"], ["", stop]):  # a string is one stop string; an empty one stops nothing
        given = {"until": until, "max_gen_toks": 12}
        stopped = model.generate_until(requests("generate_until", [(p, given) for p in prompts]), True)
        assert stopped == [text.split(stop)[0] for text in single]
    assert model.generate_until(requests("generate_until", [(prompts[0], {"max_gen_toks": 12})]), True) == single[:1]


def test_a_causal_checkpoint_is_ar_too_and_speculates(checkpoints, tmp_path):
    model = load_model(checkpoints["bd3lm"])
    model.config.context = "causal"
    save_model(model, tmp_path / "causal", tokenizer=Tokenizer(checkpoints["bd3lm"]))
    checkpoints = checkpoints | {"ar": str(tmp_path / "causal"), "bd3lm": str(tmp_path / "causal")}
    prompts = requests("generate_until", [(words(n, n), {"until": [], "max_gen_toks": 12}) for n in (5, 2, 9)])
    plain = lm(checkpoints, "ar")
    expected = plain.generate_until(prompts, True)
    for objective in ("ar", "bd3lm"):
        faster = lm(checkpoints, objective, speculate=4)
        assert faster.generate_until(prompts, True) == expected
        assert faster.counts["generated", "forwards"] <= plain.counts["generated", "forwards"]
    pairs = requests("loglikelihood", PAIRS)
    assert faster.loglikelihood(pairs, True) != plain.loglikelihood(pairs, True)  # a bound, and exact


def test_no_forward_takes_more_tokens_than_there_is_room_for(checkpoints):
    model, shapes = lm(checkpoints, "mdlm", "auto"), []
    model.room = 60
    model.model.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    arguments = [(words(n, n), {"until": [], "max_gen_toks": 6}) for n in (1, 14, 2, 9, 3, 14)]
    model.generate_until(requests("generate_until", arguments), True)
    assert max(B for B, _ in shapes) > 2 and max(B * T for B, T in shapes) <= 60


def test_answers_that_have_all_said_a_stop_string_are_not_finished(checkpoints):
    model, (text, gen) = lm(checkpoints, "ar"), (words(4), {"until": [], "max_gen_toks": 40})
    (whole,) = model.generate_until(requests("generate_until", [(text, gen)]), True)
    model.counts.clear()
    until = whole.split()[2]
    (answer,) = model.generate_until(requests("generate_until", [(text, gen | {"until": [until]})]), True)
    assert answer == whole.split(until)[0] and model.counts["generated", "forwards"] == 16 < 40


def test_a_stop_string_that_is_a_special_token_ends_an_answer_and_counts_as_its_token(checkpoints):
    tokenizer = Tokenizer(GOLDEN / "models" / "qwen3")
    (start,) = tokenizer.encode("<|im_start|>")
    model = lm(checkpoints, "ar", suppress_tokens=[i for i in range(tokenizer.mask_id + 8) if i != start])
    for until, tokens in (([], 7), (["<|im_start|>"], 1)):
        model.counts.clear()
        gen = {"until": until, "max_gen_toks": 7}
        assert model.generate_until(requests("generate_until", [("w1", gen)]), True) == [""]
        assert model.counts["generated", "tokens"] == tokens


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_cached_is_what_is_answered(checkpoints, objective):
    model, kept = lm(checkpoints, objective, is_check_greedy=True, mc_num=4), {}

    class Hook:
        def add_partial(self, kind, arguments, answer):
            kept[kind, json.dumps(arguments)] = answer

    model.cache_hook = Hook()
    gen = {"until": [], "max_gen_toks": 4}
    kinds = {
        "loglikelihood": [("w1 w2 w3", " w4 w5 w6 w7"), ("w6", " w7 w8 w9 w1")],  # with an error, which is not kept
        "loglikelihood_rolling": [("w1 w2 w3",), ("w4 w5",)],
        "generate_until": [("w1", gen), ("w2 w3", gen)],
    }
    for kind, arguments in kinds.items():
        answers = getattr(model, kind)(requests(kind, arguments), True)
        assert [kept[kind, json.dumps(each)] for each in arguments] == answers
    assert len(kept) == 6


def test_the_answer_is_as_long_as_task_and_model_args_allow(checkpoints):
    prompt = words(4)

    def count(gen, **model_args):
        model = lm(checkpoints, "mdlm", suppress_tokens=[502, 500], **model_args)
        return len(model.generate_until(requests("generate_until", [(prompt, gen)]), True)[0].split())

    assert count({"until": [], "max_gen_toks": 5}) == 5
    assert count({"until": [], "max_gen_toks": 5}, max_new_tokens=3) == 3
    assert count({"until": [], "max_gen_toks": 5}, max_new_tokens=9) == 5
    assert count({"until": []}, max_new_tokens=6) == 6
    assert count({"until": [], "max_tokens": 4}, max_new_tokens=6, steps=2) == 4


def test_a_tasks_temperature_counts_with_do_sample_and_a_model_arg_before_it(checkpoints):
    def options(gen, **model_args):
        return lm(checkpoints, "mdlm", **model_args)._request_options(gen)[1]

    assert options({"temperature": 0.7})["temperature"] == 0.7
    assert options({"do_sample": False, "temperature": 0.7})["temperature"] == 0
    assert options({"do_sample": True, "temperature": 0.7, "top_p": 0.9})["top_p"] == 0.9
    assert options({"do_sample": True, "temperature": 0.7}, temperature=0.2)["temperature"] == 0.2
    with pytest.raises(ValueError, match="num_beams is unknown"):
        options({"num_beams": 2})


def test_sampling_is_repeatable(checkpoints):
    gen = {"until": [], "max_gen_toks": 6}
    answers = [
        lm(checkpoints, "bd3lm", temperature=1.0, seed=seed).generate_until(
            requests("generate_until", [("w1", gen)]), True
        )
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]
    alone, other, both = (  # at this temperature the noise alone decides
        lm(checkpoints, "ar", 1, temperature=1e9).generate_until(
            requests("generate_until", [(text, gen) for text in texts]), True
        )
        for texts in (["w1"], ["w2"], ["w2", "w1"])
    )
    assert alone != other and both == other + alone


def test_chat_prompts_are_the_templates_and_continue_a_prefix(checkpoints):
    model = lm(checkpoints, "mdlm")
    chat = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2 w3"}]
    text = model.apply_chat_template(chat)
    assert model.tok_encode(text) == model.tokenizer.render(chat, reply=True)[0]
    begun = model.apply_chat_template(
        [*chat, {"role": "assistant", "content": " w4 w5\n"}], add_generation_prompt=False
    )
    assert begun.startswith(text[:-5]) and begun.endswith(" w4 w5\n")
    chat = [{"role": "user", "content": "w4 w5"}, {"role": "assistant", "content": "w4"}]
    begun = model.apply_chat_template(chat, add_generation_prompt=False)
    assert begun == model.apply_chat_template(chat[:1]) + "w4"  # not where that stands first
    model.tokenizer.template = "{% for message in messages %}<{{ message.content | trim }}>{% endfor %}"
    chat[1]["content"] = " w6\n"
    assert model.apply_chat_template(chat, add_generation_prompt=False) == "<w4 w5><w6"
    assert model.chat_template(True) == model.tokenizer.template and model.chat_template(False) is None


# ---------------------------------------------------------------------------------------------------------------------
# model_args


def test_model_args_are_typed_and_each_sampler_option_is_one():
    given = {"pretrained": "x", "steps": 7, "cfg_scale": 0, "stochastic_transfer": True, "cfg_keep_tokens": [1, 2]}
    options = evaluate.parse_model_args(given | {"remasking": "p2", "top_p": 0.5, "threshold": None})
    assert (options.steps, options.cfg_scale, options.stochastic_transfer) == (7, 0.0, True)
    assert (options.cfg_keep_tokens, options.remasking, options.top_p) == ((1, 2), "p2", 0.5)
    assert set(flags(Sampling)) <= set(vars(options))


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ({"blocksize": 4}, "unknown model_arg blocksize; did you mean block_size?"),
        ({"steps": 1.5}, "model_arg steps: invalid int value: '1.5'"),
        ({"remasking": "lowest"}, "model_arg remasking: invalid choice: 'lowest'"),
        ({"pretrained": None}, "pretrained"),
    ],
)
def test_wrong_model_args_are_named(model_args, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        evaluate.parse_model_args({"pretrained": "x"} | model_args)


def test_an_objective_that_is_not_the_models_is_refused(checkpoints):
    with pytest.raises(ValueError, match=r"--model a2d_bd3lm contradicts .* declares objective mdlm; pass --model a2d"):
        evaluate.models()["a2d_bd3lm"](pretrained=checkpoints["mdlm"], block_size=4)
    with pytest.raises(ValueError, match="contradicts the checkpoint"):
        evaluate.models()["a2d_ar"](pretrained=checkpoints["bd3lm"])
    with pytest.raises(ValueError, match="batch_size 0"):
        evaluate.models()["a2d_ar"](pretrained=checkpoints["ar"], batch_size=0)


# ---------------------------------------------------------------------------------------------------------------------
# Through lm-eval

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: {target}
{more}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A directory of a multiple-choice, a generative and a perplexity task, nine questions each."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [{"text": words(4, i), "a": words(2, i + 20), "b": words(3, i + 40), "gold": i % 2} for i in range(9)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generation = "generation_kwargs: {until: [w3], max_gen_toks: 5}\nmetric_list: [{metric: exact_match}]"
    for name, kind, target, more in [
        ("choice", "multiple_choice", "gold", 'doc_to_choice: "{{[a, b]}}"\nmetric_list: [{metric: acc}]'),
        ("write", "generate_until", '"{{a}}"', generation),
        ("text", "loglikelihood_rolling", '"{{text}}"', "metric_list: [{metric: word_perplexity}]"),
    ]:
        text = TASK.format(name=name, file=path / "rows.jsonl", kind=kind, target=target, more=more)
        (path / f"{name}.yaml").write_text(text)
    return path


def scores(checkpoints, directory, objective, **options):
    manager = TaskManager(include_path=[str(directory), str(ROOT / "tasks")], include_defaults=False)
    return simple_evaluate(
        model=f"a2d_{objective}",
        model_args={"pretrained": checkpoints[objective], "mc_num": 8},
        task_manager=manager,
        bootstrap_iters=10,
        **options,
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lm_eval_runs_every_kind_of_task_by_the_registered_name(checkpoints, tasks, objective):
    found = scores(checkpoints, tasks, objective, tasks=["choice", "write", "text"], batch_size="auto")
    assert 0 <= found["results"]["choice"]["acc,none"] <= 1
    assert found["results"]["text"]["word_perplexity,none"] > 1
    assert found["config"]["model"] == f"a2d_{objective}"
    one = scores(checkpoints, tasks, objective, tasks=["choice", "write", "text"], batch_size=1)
    assert found["results"]["write"] == one["results"]["write"]
    texts = [[sample["resps"] for sample in run["samples"]["write"]] for run in (found, one)]
    assert texts[0] == texts[1]


def test_few_shots_as_turns_and_a_system_instruction_reach_the_prompt(checkpoints, tasks):
    found = scores(
        checkpoints,
        tasks,
        "mdlm",
        tasks=["write"],
        limit=2,
        num_fewshot=0,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        system_instruction="w77",
    )
    prompt = found["samples"]["write"][0]["arguments"][0][0]
    assert "w77" in prompt and prompt.index("w77") < prompt.index(words(4, 0))


def test_the_request_cache_answers_a_second_time(checkpoints, tasks, tmp_path, monkeypatch):
    first = scores(checkpoints, tasks, "bd3lm", tasks=["choice", "write", "text"], use_cache=str(tmp_path / "cache"))
    monkeypatch.setattr(evaluate.A2D, "_generate", lambda *args, **options: pytest.fail("not from the cache"))
    monkeypatch.setattr(evaluate.A2D, "_loglikelihood_tokens", lambda *args, **kw: pytest.fail("not from the cache"))
    second = scores(checkpoints, tasks, "bd3lm", tasks=["choice", "write", "text"], use_cache=str(tmp_path / "cache"))
    assert first["results"] == second["results"]


def test_a_manifest_has_no_hash_of_prompts_where_a_cache_may_have_answered_some(checkpoints, tasks, tmp_path):
    manager = TaskManager(include_path=[str(tasks)], include_defaults=False)
    for cache in (None, str(tmp_path / "cache")):
        model = lm(checkpoints, "mdlm")
        options = {"tasks": ["write"], "task_manager": manager, "bootstrap_iters": 10, "use_cache": cache}
        made = report.manifest(model, model.counts, simple_evaluate(model=model, **options), [], 1.0)
        assert (made["tasks"]["write"]["prompts_sha256"] is None) == (cache is not None)


def test_sums_is_the_quickstarts_questions(checkpoints, tasks):
    found = scores(checkpoints, tasks, "mdlm", tasks=["sums"], limit=3, apply_chat_template=True)
    questions = [row["messages"] for row in evaluate_rows()]
    assert len(questions) == 500
    for sample, (question, answer) in zip(found["samples"]["sums"], questions):
        assert question["content"] in sample["arguments"][0][0]
        assert sample["target"] == answer["content"]


def evaluate_rows():
    from data import raw

    return list(raw("builtin/sums[test:500]", "test"))


def test_ar_is_lm_evals_own_hf_on_the_same_weights(checkpoints, tasks, capsys):
    """Where transformers and accelerate are installed, which nothing else here needs: the independent reference."""
    pytest.importorskip("transformers", reason="needs lm-eval[hf], transformers among it")
    pytest.importorskip("lm_eval.models.huggingface", reason="needs lm-eval[hf]")
    options = {
        "tasks": ["choice", "write", "text"],
        "bootstrap_iters": 10,
        "apply_chat_template": True,
        "batch_size": 3,
    }
    manager = TaskManager(include_path=[str(tasks)], include_defaults=False)
    arguments = {"pretrained": checkpoints["ar"], "dtype": "float32"}
    ours = simple_evaluate(model="a2d_ar", model_args=arguments, task_manager=manager, **options)
    theirs = simple_evaluate(model="hf", model_args=arguments, task_manager=manager, device="cpu", **options)
    for task in options["tasks"]:
        for one, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert one["prompt_hash"] == other["prompt_hash"]
            if task == "write":
                assert one["resps"] == other["resps"]
            elif task == "text":
                assert one["resps"][0][0] == pytest.approx(other["resps"][0][0], abs=1e-3)
            else:
                for (a,), (b,) in zip(one["resps"], other["resps"], strict=True):
                    assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]
    with capsys.disabled():
        print()
        for task in options["tasks"]:
            for metric, value in ours["results"][task].items():
                if isinstance(value, float) and "stderr" not in metric:
                    assert theirs["results"][task][metric] == pytest.approx(value, rel=1e-4)
                    print(f"{task:8} {metric:25} a2d_ar {value:12.6g}   hf {theirs['results'][task][metric]:12.6g}")


# ---------------------------------------------------------------------------------------------------------------------
# tasks/


def test_letters_are_read_as_the_task_files_say():
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    answers = {" B": "B", "(C)": "C", "A.": "A", "The D": "D", "Answer: A": "A", "Bad": None, "b": None, "": None}
    for name in ("mmlu_generative_dream", "hellaswag_gen"):
        config = yaml.load((ROOT / "tasks" / f"{name}.yaml").read_text(), Loader)
        assert config["generation_kwargs"]["max_gen_toks"] == 3 and config["num_fewshot"] == 0
        pattern = re.compile(config["filter_list"][0]["filter"][0]["regex_pattern"])
        for text, letter in answers.items():
            found = pattern.findall(text)
            assert (found[0] if found else None) == letter


# ---------------------------------------------------------------------------------------------------------------------
# Manifests


def cell(checkpoint: str, value: float, **changes) -> dict:
    task = {"version": 1.0, "num_fewshot": 0, "questions": 10, "generation_kwargs": {}, "prompts_sha256": "a"}
    task["results"] = {"acc,none": value, "acc_stderr,none": 0.01, "alias": "quiz"}
    made = {
        "date": 1.0,
        "model": "a2d_mdlm",
        "checkpoint": checkpoint,
        "sampler": {"max_new_tokens": 8, "temperature": None, "steps": 8, "scheduler": "linear"},
        "gen_kwargs": {},
        "chat_template_sha": None,
        "system_instruction": None,
        "fewshot_as_multiturn": None,
        "limit": None,
        "requested": ["quiz"],
    }
    return made | {"tasks": {"quiz": task | changes}}


def test_the_table_marks_cells_that_were_asked_otherwise(tmp_path):
    cells = [cell("a", 0.5), cell("b", 0.25), cell("c", 0.75, num_fewshot=5)]
    for i, made in enumerate(cells):
        (tmp_path / f"manifest_{i}.json").write_text(json.dumps(made))
    rendered = report.table([str(tmp_path)])
    assert "| a (a2d_mdlm, steps 8) | 50.0 ± 1.0 |" in rendered
    assert "| c (a2d_mdlm, steps 8) | 75.0 ± 1.0 [1] |" in rendered
    assert rendered.endswith("[1] not comparable: shots 5 where the column has 0")
    with pytest.raises(FileNotFoundError, match="--output_path"):
        report.table([str(tmp_path / "nowhere")])


def test_the_table_shows_rates_in_percent_and_bits_perplexities_and_likelihoods_as_they_are(tmp_path):
    made = cell("a", 0.5)
    made["tasks"]["quiz"]["results"] = {"acc,none": 0.5, "bits_per_byte,none": 0.85, "word_perplexity,none": 12.345}
    (tmp_path / "manifest_a.json").write_text(json.dumps(made))
    assert report.table([str(tmp_path)]).splitlines()[2].endswith("| 50.0 | 0.85 | 12.35 |")


def test_of_several_manifests_of_a_cell_the_table_shows_the_newest(tmp_path):
    for name, dates in {"a": (1, 2, 3), "b": (3, 2, 1), "c": (2, 3, 1), "d": (2, 1, 3)}.items():
        for i, date in enumerate(dates):
            made = cell(name, date / 10) | {"date": float(date)}
            (tmp_path / f"manifest_{name}{i}.json").write_text(json.dumps(made))
    rendered = report.table([str(tmp_path)])
    assert rendered.count("| 30.0 ± 1.0 |") == 4 and "10.0" not in rendered and "20.0" not in rendered


@pytest.mark.parametrize("argv", [["--help"], []])
def test_the_manual_names_every_model_arg(argv, capsys):
    evaluate.main(argv)
    told = capsys.readouterr().out
    assert all(name in told for name in (*flags(Sampling), "mc_num", "is_check_greedy", "--table"))


# ---------------------------------------------------------------------------------------------------------------------
# The program, with upstream's 14,000 tasks (lm-eval reads them all: ten seconds and more a run)


def program(*argv: str, processes: int = 1, cwd=None) -> subprocess.CompletedProcess:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    return subprocess.run([*launch, str(ROOT / "evaluate.py"), *argv], capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_give_what_one_gives_and_the_manifest_tells_all(checkpoints, tasks, tmp_path, objective):
    made = {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        done = program(
            *("--model", f"a2d_{objective}", "--model_args", f"pretrained={checkpoints[objective]},mc_num=8"),
            *("--tasks", "choice,write,text", "--include_path", str(tasks), "--batch_size", "2"),
            *("--output_path", str(output), "--log_samples"),
            processes=processes,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = output.rglob("manifest_*.json")
        made[processes] = json.loads(file.read_text())
        (errors,) = output.rglob("standard_errors_*.jsonl")
        made[processes]["errors"] = [json.loads(line) for line in errors.read_text().splitlines()]
    one, two = made[1], made[2]
    for task in ("choice", "write", "text"):
        for metric, value in one["tasks"][task]["results"].items():
            same = value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
            assert two["tasks"][task]["results"][metric] == same or "stderr" in metric
        assert one["tasks"][task]["prompts_sha256"] == two["tasks"][task]["prompts_sha256"] is not None
    assert len(one["errors"]) == len(two["errors"]) == 2 * 9 + 9
    assert one["checkpoint_sha256"] == two["checkpoint_sha256"] and two["processes"] == 2
    for name in ("command", "commit", "config", "dtype", "sampler", "hardware", "packages", "tokens_per_forward"):
        assert one[name], name
    assert "choice<br>acc" in report.table([str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_args", "flags", "message"),
    [
        ("stepz=3", ["--tasks", "choice"], "unknown model_arg stepz; did you mean steps?"),
        ("steps=3", ["--tasks", "chioce"], "Tasks not found: chioce"),
        ("steps=3", ["--tasks", "broken"], "broken.yaml is no task"),
        ("steps=3", ["--tasks", "unloadable"], "a task cannot be loaded: Cannot import module 'nowhere'"),
        ("max_length=2", ["--tasks", "choice"], "leaves no room for a context"),
        ("right_shift_logits=maybe", ["--tasks", "choice"], "model_arg right_shift_logits: 'maybe'"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(checkpoints, tasks, tmp_path, model_args, flags, message):
    for file in tasks.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    if "broken" in flags:
        (tmp_path / "broken.yaml").write_text("task: broken\n  dataset: [\n")
    text = (tasks / "write.yaml").read_text().replace("task: write", "task: unloadable")
    (tmp_path / "unloadable.yaml").write_text(text + "\nprocess_docs: !function nowhere.nothing\n")
    done = program(
        *("--model", "a2d_mdlm", "--model_args", f"pretrained={checkpoints['mdlm']},{model_args}"),
        *("--include_path", str(tmp_path), *flags),
    )
    assert done.returncode == 2
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# recipes/eval.sh


def recipe(folder: Path, *argv: str) -> subprocess.CompletedProcess:
    """The commands it would run, for a checkpoint of block length 8: a stand-in for Python prints them."""
    python = folder / "python"
    python.write_text('#!/bin/sh\ncase $1 in -c) echo "$4 8" ;; *) echo "$@" ;; esac\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python)}
    return subprocess.run(
        ["sh", str(ROOT / "recipes" / "eval.sh"), *argv], capture_output=True, text=True, env=environment
    )


def test_the_recipe_tells_a_model_out_of_reach_in_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = subprocess.run(
        ["sh", str(ROOT / "recipes" / "eval.sh"), "--model_name_or_path", "./nowhere"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert done.returncode == 2 and re.fullmatch(r"eval\.sh: \./nowhere is neither a directory .*\n", done.stderr)


@pytest.mark.parametrize("method", OBJECTIVES)
def test_the_recipe_runs_eight_tasks_in_two_settings(method, tmp_path):
    flags = ("--method", method, "--output_dir", "out", "--", "--limit", "4")
    commands = recipe(tmp_path, "--model_name_or_path", "some/model", *flags).stdout.splitlines()
    runs = [line for line in commands if "--tasks" in line]
    asked = "mmlu_generative_dream mmlu_pro hellaswag_gen gsm8k_cot bbh minerva_math humaneval_instruct_sandboxed "
    asked = [*asked.split(), "mbpp_instruct_sandboxed"]
    assert [line.split("--tasks ")[1].split()[0] for line in runs] == asked * 2
    assert all(f"--model a2d_{method} --model_args pretrained=some/model" in line for line in runs)
    assert all(line.endswith("--limit 4") and "--apply_chat_template" in line for line in runs)
    assert len({line.split("--output_path ")[1].split()[0] for line in runs}) == 16
    shots = [line.split("--num_fewshot ")[1].split()[0] for line in runs if "gsm8k_cot" in line]
    assert shots == ["0" if method == "bd3lm" else "5", "0"]
    block = {"ar": None, "mdlm": "block_size=256", "bd3lm": "block_size=8"}[method]
    assert block is None or block in next(line for line in runs if "bbh" in line)
    for line in runs:
        given = dict(pair.split("=", 1) for pair in line.split("--model_args ")[1].split()[0].split(","))
        evaluate.parse_model_args(given)
    assert sum("--table" in line for line in commands) == 2


def test_the_recipes_coder_cells_processes_and_mistakes(tmp_path):
    coder = ("--model_name_or_path", "fredzzp/open-dcoder-0.5B", "--method", "mdlm", "--model_type", "coder")
    runs = [line for line in recipe(tmp_path, *coder, "--num_gpu", "4").stdout.splitlines() if "--tasks" in line]
    assert len(runs) == 4 and all("--nproc_per_node 4" in line for line in runs)
    assert all("right_shift_logits=True,remasking=p2" in line for line in runs)
    for argv, message in [
        ((), "--model_name_or_path is missing"),
        (("--model", "x"), "unknown flag --model"),
        (("--model_name_or_path",), "needs a value"),
        (("--model_name_or_path", "x", "--setting", "all"), "expected reference, common or both"),
        (("--model_name_or_path", "x", "--model_type", "chat"), "expected normal or coder"),
        (("--model_name_or_path", "x", "--method", "gan"), "expected ar, mdlm or bd3lm"),
    ]:
        done = recipe(tmp_path, *argv)
        assert done.returncode == 2 and message in done.stderr
