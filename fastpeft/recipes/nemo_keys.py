"""What the keys of NeMo 1's tuning files and of NeMo-Aligner's mean here, as tables.

Keys stand as NeMo has them, with three spellings made one (`canonical`): ``data`` and ``model.data``; NeMo-Aligner's
``trainer.sft.max_steps`` and ``trainer.max_steps``; ``file_path`` and ``file_names``.

    TABLE     NeMo's key -> key of the run, and how the value changes
    NEUTRAL   keys that ask for what there is not, with the values that ask for nothing
    IGNORED   keys that change nothing about a run here
    READ      keys that `nemo_yaml` reads several of at once

Source: megatron_gpt_finetuning_config.yaml of NeMo 1; gpt_sft, training_rm, gpt_dpo and gpt_ppo_actor of NeMo-Aligner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ALIGNER = {"sft": "sft", "rm": "reward", "dpo": "dpo", "ppo": "ppo"}  # sections of trainer, and the kinds of run
# Sections of NeMo-Aligner's other trainers, and what comes nearest.
OTHER_TRAINERS = {
    "kto": "train on pairs with trainer.dpo (fastpeft dpo has train.loss_type kto_pair)",
    "rs": "use trainer.ppo; of several answers the better ones count with fastpeft ppo and train.advantage group",
    "spin": "use trainer.dpo on pairs of given and drawn answers",
    "reinforce": "use trainer.ppo; without a value head: fastpeft ppo and train.advantage group",
    "knowledge_distillation": "use trainer.sft on the teacher's answers",
}

_DATA_SETS = ("train_ds", "validation_ds", "test_ds")


def canonical(key: tuple[str, ...]) -> str:
    """NeMo's key with the spellings that mean the same made one.

    Args:
        key: as it is nested in the file.
    """
    if key[0] == "data":
        key = ("model", *key)
    if key[0] == "trainer" and len(key) > 2 and key[1] in ALIGNER:
        key = ("trainer", *key[2:])
    if key == ("pretrained_checkpoint", "restore_from_path"):
        key = ("model", "restore_from_path")
    if key[-1] in ("file_path", "file_names"):
        key = (*key[:-1], "files")
    return ".".join(key)


def _number(value: Any) -> Any:
    return value


def _or_0(value: Any) -> Any:
    """No clipping is a null in NeMo and a 0 here."""
    return 0.0 if value is None else value


TABLE: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "model.seed": ("train.seed", _number),
    "trainer.log_every_n_steps": ("train.logging_steps", _number),
    "trainer.gradient_clip_val": ("train.max_grad_norm", _or_0),
    "model.optim.lr": ("train.learning_rate", _number),
    "model.optim.weight_decay": ("train.weight_decay", _or_0),
    "model.optim.eps": ("train.adam_epsilon", _number),
    "model.dpo.ref_policy_kl_penalty": ("train.beta", _number),
    "trainer.initial_policy_kl_penalty": ("train.kl_coef", _number),
    "trainer.discount_factor": ("train.gamma", _number),
    "trainer.gae_lambda": ("train.lam", _number),
    "model.ppo.ratio_eps": ("train.cliprange", _number),
    "model.ppo.rollout_micro_batch_size": ("train.forward_batch_size", _number),
    "model.ppo.length_params.max_length": ("train.response_length", _number),
    "model.ppo.sampling_params.temperature": ("train.temperature", _number),
}
# Which of these a kind of run has no setting for; NeMo-Aligner's files are started by kind, so none of them is stray.
ONLY_FOR = {"model.dpo.": "dpo", "model.ppo.": "ppo"}

_ONE_GPU = (
    "a model is held by one GPU here; pack it (peft_scheme qlora) or recompute (activations_checkpoint_granularity)"
)
_NO_NEMO_STATE = "a checkpoint of NeMo cannot be continued; exp_manager.resume_if_exists continues runs of ours"
_DROPOUT = "the model's own configuration says its dropout"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "model.tensor_model_parallel_size": ((1, None), _ONE_GPU),
    "model.pipeline_model_parallel_size": ((1, None), _ONE_GPU),
    "model.context_parallel_size": ((1, None), _ONE_GPU),
    "model.expert_model_parallel_size": ((1, None), _ONE_GPU),
    "model.sequence_parallel": ((False, None), _ONE_GPU),
    "model.fsdp": ((False, None), "one GPU or several with torchrun (DDP) work"),
    "model.hidden_dropout": ((0, None), _DROPOUT),
    "model.attention_dropout": ((0, None), _DROPOUT),
    "model.ffn_dropout": ((0, None), _DROPOUT),
    "model.resume_from_checkpoint": (
        (None,),
        _NO_NEMO_STATE,
    ),
    "exp_manager.resume_from_checkpoint": (
        (None,),
        _NO_NEMO_STATE,
    ),
    "model.peft.restore_from_path": ((None,), "a .nemo adapter is a pickle; start a new one"),
    "model.peft.restore_from_ckpt.checkpoint_dir": ((None,), _NO_NEMO_STATE),
    "model.peft.lora_tuning.weight_tying": ((False, None), "every layer has its own weights here"),
    "model.peft.adapter_tuning.weight_tying": ((False, None), "every layer has its own weights here"),
    "model.peft.lora_tuning.row_init_method": (
        ("zero", None),
        "B begins with zeros, so that the run begins at its base",
    ),
    "model.peft.adapter_tuning.row_init_method": (("zero", None), "the way up begins with zeros"),
    "model.peft.ia3_tuning.layer_selection": ((None,), "(IA)^3 scales every layer here"),
    "model.data.train_ds.add_eos": ((True, None), "an answer ends with EOS here, or the model would not learn to stop"),
    "model.data.train_ds.add_sep": ((False, None), "write the separator into prompt_template"),
    "model.reward_model_type": (("binary_ranking", None), "rewards are learnt from pairs and rankings here"),
    "model.output_sequence": ((False, None), "a score is one number an answer here"),
    "model.use_avg_pool": ((False, None), "a score is read at an answer's last token here"),
    "model.dpo.gt_reward_scale": ((1, None), "it is of the rpo losses, which this version does not have"),
    "trainer.normalize_advantages": ((True, None), "advantages are whitened here"),
    "trainer.critic_warmup_steps": ((0, None), "policy and value learn together here"),
    "model.ppo.entropy_bonus": (
        (0, None),
        "there is no entropy bonus here; set it to 0",
    ),
    "model.ppo.sampling_params.use_greedy": ((False, None), "PPO learns from what is drawn"),
    "model.ppo.sampling_params.top_k": ((0, None), "answers are drawn from the whole distribution"),
    "model.ppo.sampling_params.top_p": ((1, None), "answers are drawn from the whole distribution"),
    "model.ppo.sampling_params.repetition_penalty": ((1, None), "answers are drawn from the model's own distribution"),
    "model.ppo.length_params.min_length": ((0, 1, None), "an answer may end as soon as the model ends it"),
    "model.optim.sched.reduce_on_plateau": ((False, None), "use a schedule by name, such as CosineAnnealing"),
}

_DATA_SET_KEYS = (
    *("shuffle", "num_workers", "memmap_workers", "pin_memory", "min_seq_length", "drop_last", "index_mapping_dir"),
    *("global_sample_mapping", "hf_dataset", "names", "write_predictions_to_file", "output_file_path_prefix"),
    *("tokens_to_generate", "metric.name", "metric.average", "metric.num_classes", "output_original_text", "add_bos"),
    *(
        "special_tokens",
        "seed",
        "persistent_workers",
        "is_test",
        "packed_sequence",
        "pad_to_max_length",
        "ceil_to_power_2",
    ),
)
_READ_OF_DATA_SETS = (
    *("files", "global_batch_size", "micro_batch_size", "max_seq_length", "label_key", "add_eos", "add_sep"),
    *("truncation_field", "truncation_method", "prompt_template", "concat_sampling_probabilities"),
)
READ = frozenset(
    {
        *(
            "name",
            "model.restore_from_path",
            "trainer.devices",
            "trainer.num_nodes",
            "trainer.precision",
            "trainer.max_epochs",
        ),
        *("trainer.max_steps", "trainer.val_check_interval", "trainer.save_interval", "trainer.use_absolute_kl"),
        *("model.global_batch_size", "model.micro_batch_size", "model.answer_only_loss", "model.encoder_seq_length"),
        *("model.activations_checkpoint_granularity", "model.optim.name", "model.optim.betas", "model.data.seq_length"),
        *(f"model.optim.sched.{key}" for key in ("name", "warmup_steps", "warmup_ratio", "constant_steps")),
        *(f"model.optim.sched.{key}" for key in ("constant_ratio", "min_lr", "max_steps", "power", "hold_steps")),
        *(f"exp_manager.{key}" for key in ("explicit_log_dir", "exp_dir", "name", "resume_if_exists")),
        *("exp_manager.create_wandb_logger", "exp_manager.create_tensorboard_logger"),
        *("exp_manager.wandb_logger_kwargs.name", "exp_manager.create_early_stopping_callback"),
        *(f"exp_manager.checkpoint_callback_params.{key}" for key in ("save_top_k", "every_n_train_steps")),
        *(f"exp_manager.checkpoint_callback_params.{key}" for key in ("save_best_model", "monitor", "mode")),
        *("exp_manager.create_checkpoint_callback", "model.peft.peft_scheme", "model.data.chat"),
        *(f"model.peft.lora_tuning.{key}" for key in ("variant", "target_modules", "adapter_dim", "alpha")),
        *(f"model.peft.lora_tuning.{key}" for key in ("adapter_dropout", "column_init_method", "layer_selection")),
        "model.peft.lora_tuning.dropout_position",
        *(f"model.peft.adapter_tuning.{key}" for key in ("type", "adapter_dim", "adapter_dropout", "norm_position")),
        *(f"model.peft.adapter_tuning.{key}" for key in ("column_init_method", "layer_selection")),
        *(f"model.peft.p_tuning.{key}" for key in ("virtual_tokens", "bottleneck_dim", "embedding_dim", "init_std")),
        "model.peft.selective_tuning.tunable_base_param_names",
        *(f"model.data.{name}.{key}" for name in _DATA_SETS[:2] for key in _READ_OF_DATA_SETS),
        *("model.data.data_prefix.train", "model.data.data_prefix.validation", "model.data.data_prefix"),
        *("model.dpo.preference_loss", "model.dpo.preference_average_log_probs", "model.dpo.sft_loss_weight"),
        *("model.dpo.preference_loss_weight", "model.dpo.sft_average_log_probs", "model.ppo.num_rollout_samples"),
    }
)

# A name that ends in "*" stands for everything that begins so.
IGNORED = (
    *("defaults", "hydra.*", "trainer.accelerator", "trainer.logger*", "trainer.enable_checkpointing"),
    *("trainer.use_distributed_sampler", "trainer.replace_sampler_ddp", "trainer.max_time", "trainer.limit_*"),
    *("trainer.strategy", "trainer.num_sanity_val_steps", "trainer.enable_progress_bar", "trainer.benchmark"),
    *("trainer.accumulate_grad_batches", "trainer.model_gbs", "trainer.model_mbs", "trainer.rollout_batch_seq_length"),
    *("trainer.inference_metrics*", "trainer.enable_model_summary", "trainer.gradient_clip_algorithm"),
    *("trainer.train_random_sampler", "trainer.val_random_sampler", "trainer.trt_*", "trainer.batch_iterator*"),
    *("trainer.check_val_every_n_epoch", "trainer.callbacks", "trainer.plugins", "trainer.profiler"),
    *("exp_manager.wandb_logger_kwargs*", "exp_manager.checkpoint_callback_params*", "exp_manager.max_time_per_run"),
    *("exp_manager.early_stopping_callback_params*", "exp_manager.resume_ignore_no_checkpoint", "exp_manager.log_*"),
    *("exp_manager.use_datetime_version", "exp_manager.version", "exp_manager.files_to_copy", "exp_manager.ema*"),
    *("exp_manager.step_timing_kwargs*", "exp_manager.seconds_to_sleep", "exp_manager.disable_validation_on_resume"),
    *("exp_manager.create_*", "exp_manager.summary_writer_kwargs*"),
    *("model.sync_batch_comm", "model.megatron_amp_O2", "model.gradient_as_bucket_view", "model.use_flash_attention"),
    *("model.save_nemo_on_validation_end", "model.activations_checkpoint_method", "model.mcore_gpt", "model.precision"),
    *("model.activations_checkpoint_num_layers", "model.activations_checkpoint_layers_per_pipeline", "precision"),
    *("model.num_micro_batches_with_partial_activation_checkpoints", "model.seq_len_interpolation_factor"),
    *("model.fsdp_*", "model.steerlm*", "model.steerable_attributes*", "model.inference*", "model.regression*"),
    *("model.max_position_embeddings", "model.share_embeddings_and_output_weights", "model.force_head_dtype"),
    *("model.overwrite_base_config*", "model.tokenizer*", "model.nsys_profile*", "model.gradient_accumulation_fusion"),
    *("model.gc_interval", "model.virtual_pipeline_model_parallel_size", "model.transformer_engine", "model.fp8*"),
    *("model.ub_tp_comm_overlap*", "model.tp_comm_overlap*", "model.apply_rope_fusion", "model.use_cpu_initialization"),
    *("model.native_amp_*", "model.hysteresis", "model.use_emha", "model.batch_p2p_comm", "model.dist_ckpt_*"),
    *("model.optim.bucket_cap_mb", "model.optim.overlap_*", "model.optim.contiguous_*", "model.optim.grad_sync_dtype"),
    *("model.optim.sched.monitor", "model.optim.sched.reduce_on_plateau", "model.optim.sched.last_epoch"),
    *("model.optim.capturable", "model.optim.master_weights", "model.optim.param_sync_dtype", "model.optim.dtype"),
    *("model.peft.*_tuning.norm_type", "model.peft.*_tuning.position_embedding_strategy"),
    *("model.peft.restore_from_hparams_path", "model.peft.restore_from_ckpt*"),
    *("model.data.chat_prompt_tokens*", "model.data.sample", "model.data.num_workers", "model.data.dataloader_type"),
    *("model.data.test_ds*", "model.data.data_impl", "model.data.splits_string", "model.data.skip_warmup"),
    *("model.data.reset_*", "model.data.eod_mask_loss", "model.data.index_mapping_dir", "model.data.data_prefix.test"),
    *("model.data.pad_length_to_multiple_of", "model.data.default_*_reward", "model.data.seed"),
    *(f"model.data.{name}.{key}" for name in _DATA_SETS for key in _DATA_SET_KEYS),
    *("model.ppo.forward_micro_batch_size", "model.ppo.val_rollout_micro_batch_size", "model.ppo.num_val_samples"),
    *("model.ppo.offload_adam_states", "model.ppo.sampling_params*", "model.ppo.trt_llm*", "remote_critic_rm*"),
    *("model.forward_micro_batch_size", "model.dpo.log_prob_forward_micro_batch_size", "model.offload_adam_states"),
)

# NeMo's name of a target -> names in a Hugging Face model, by the family in its config.json; None for Llama's.
_PLAIN = {
    "attention_qkv": ("q_proj", "k_proj", "v_proj"),
    "attention_dense": ("o_proj",),
    "mlp_fc1": ("gate_proj", "up_proj"),
    "mlp_fc2": ("down_proj",),
}
_FUSED: dict[str, tuple[str, ...]] = {
    "attention_qkv": ("query_key_value",),
    "attention_dense": ("dense",),
    "mlp_fc1": ("dense_h_to_4h",),
    "mlp_fc2": ("dense_4h_to_h",),
}
FAMILIES: dict[str | None, dict[str, tuple[str, ...]]] = {
    None: _PLAIN,
    "phi3": {**_PLAIN, "attention_qkv": ("qkv_proj",), "mlp_fc1": ("gate_up_proj",)},
    "gpt2": {
        "attention_qkv": ("c_attn",),
        "attention_dense": ("attn.c_proj",),
        "mlp_fc1": ("c_fc",),
        "mlp_fc2": ("mlp.c_proj",),
    },
    **dict.fromkeys(("gpt_neox", "falcon", "bloom"), _FUSED),
}
# Further names of a target: NeMo 2's, and NeMo 1's for several at once.
TARGETS = {
    "linear_qkv": ("attention_qkv",),
    "linear_proj": ("attention_dense",),
    "linear_fc1": ("mlp_fc1",),
    "linear_fc2": ("mlp_fc2",),
    "attention": ("attention_qkv", "attention_dense"),
    "mlp": ("mlp_fc1", "mlp_fc2"),
    "all": ("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"),
}
# CanonicalLoRA's, which name one layer each.
SINGLE_TARGETS = {
    "linear_q": "q_proj",
    "linear_k": "k_proj",
    "linear_v": "v_proj",
    "linear_fc1_gate": "gate_proj",
    "linear_fc1_up": "up_proj",
}
_ADAMS = ("fused_adam", "distributed_fused_adam", "mcore_distributed_optim", "megatron_fused_adam", "adamw", "adam")
OPTIMIZERS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(_ADAMS, ("optimizer", "adamw")),
    "adafactor": ("optim", "adafactor"),
    "sgd": ("optim", "sgd"),
}
