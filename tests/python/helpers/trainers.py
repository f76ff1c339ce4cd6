"""Trainers of Transformers and TRL on tiny models: what they train on, and what they report."""

import datasets
import pytest
import torch
import transformers
import trl
from helpers.architectures import make
from helpers.patched import NoLogits
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *[f"w{i}" for i in range(93)]]  # 97, as the models'


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


def words(seed, length):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(4, 97, (length,), generator=generator))


def rows(count=8):
    """Of unequal lengths."""
    found = []
    for i in range(count):
        ids = torch.randint(4, 97, (4 + i,), generator=torch.Generator().manual_seed(i)).tolist()
        found.append(dict(input_ids=ids, labels=[-100] * (i % 3) + ids[i % 3 :]))
    return found


def pad(batch):
    length = max(len(row["input_ids"]) for row in batch)

    def padded(key, value):
        return torch.tensor([row[key] + [value] * (length - len(row[key])) for row in batch])

    ids = padded("input_ids", 0)
    mask = (ids != 0).long()
    return dict(input_ids=ids, labels=padded("labels", -100), attention_mask=mask)


def arguments(kind, tmp_path, **more):
    given = dict(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=1,
    )
    return kind(**{**given, **more})


def history(trainer):
    trainer.train()
    keys = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "logits/chosen", "aux_loss")
    keys += ("rewards/margins", "kl", "eval_loss", "logps/chosen")
    return [{k: e[k] for k in keys if k in e} for e in trainer.state.log_history if "loss" in e]


def assert_same(got, want):
    assert len(got) == len(want) > 0
    for g, w in zip(got, want):
        assert g.keys() == w.keys()
        assert list(g.values()) == pytest.approx(list(w.values()), rel=2e-4, abs=2e-5)


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)


def sft(base, model, tokenizer, tmp_path, peft_config=None, **more):
    data = [
        dict(prompt=words(i, 3), completion=" " + words(50 + i, 2 + i % 4)) for i in range(8)
    ]
    args = arguments(trl.SFTConfig, tmp_path, **more)
    data = datasets.Dataset.from_list(data)
    transformers.set_seed(2)
    return base(
        model=model, args=args, train_dataset=data, processing_class=tokenizer,
        peft_config=peft_config, eval_dataset=data if "eval_strategy" in more else None,
    )  # fmt: skip


def grpo(base, model, tokenizer, tmp_path, peft_config=None, **more):
    def reward(completions, **kwargs):
        return [float(len(set(c)) % 5) for c in completions]

    more = dict(num_generations=2, max_completion_length=5, temperature=0.8, **more)
    args = arguments(trl.GRPOConfig, tmp_path, **more)
    data = datasets.Dataset.from_list([dict(prompt=words(i, 3)) for i in range(8)])
    transformers.set_seed(2)
    return base(
        model=model, args=args, train_dataset=data, processing_class=tokenizer,
        reward_funcs=reward, peft_config=peft_config,
    )  # fmt: skip


def without_logits_in_the_loss(trainer):
    """Generating makes them."""
    compute = trainer._compute_loss

    def checked(*args, **kwargs):
        with NoLogits():
            return compute(*args, **kwargs)

    trainer._compute_loss = checked
    return trainer


class NoLogitsOfSequences(TorchDispatchMode):
    """None of (sequences, length, V). A chunk of rows of distillation's is of (rows, V)."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(results):
            if isinstance(t, torch.Tensor) and t.dim() > 2:
                assert t.shape[-1] != 97, f"{function} made a tensor of shape {tuple(t.shape)}"
        return results


def gkd(base, model, tokenizer, tmp_path, peft_config=None, **more):
    from trl.experimental.gkd import GKDConfig

    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"

    def messages(i):
        yield dict(role="user", content=words(i, 3))
        yield dict(role="assistant", content=words(50 + i, 2 + i % 4))

    data = datasets.Dataset.from_list([dict(messages=list(messages(i))) for i in range(8)])
    more = dict(lmbda=0.0, max_new_tokens=4, **more) if "lmbda" not in more else more
    args = arguments(GKDConfig, tmp_path, **more)
    transformers.set_seed(2)
    return base(
        model=model, teacher_model=make("Gemma2ForCausalLM", final_logit_softcapping=3.0),
        args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer,
        peft_config=peft_config,
    )  # fmt: skip


class Own(trl.SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        given = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "labels")}
        return model(**given).loss


class ForMetrics(trl.SFTTrainer):
    """The fused head is called, but not for the loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen = model(**inputs, fused_lm_head=True).log_probs
        return model(**inputs).loss


class WithoutGradients(trl.SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            self.seen = model(**inputs, fused_lm_head=True).log_probs
        return next(model.parameters()).square().sum()
