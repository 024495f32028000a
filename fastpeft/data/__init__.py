"""Records -> checked rows -> token batches: JSON Lines reading, chat templates, loss masks, collators."""

from fastpeft.data.collator import SFTCollator
from fastpeft.data.comparisons import Comparison, parse_comparison
from fastpeft.data.forms import Message, Record
from fastpeft.data.layout import encode_prompt, stop_token_ids
from fastpeft.data.mixture import MixedDataset
from fastpeft.data.order import ComputedShuffle, LengthGrouped, shuffled
from fastpeft.data.packing import PackedDataset, pack
from fastpeft.data.preference_batch import PreferenceCollator
from fastpeft.data.preferences import PreferenceDataset, PreferenceReport, build_preference_dataset
from fastpeft.data.prompts import PromptDataset, PromptReport, build_prompt_dataset
from fastpeft.data.records import load_records, read_records
from fastpeft.data.sft import IGNORE_INDEX, DataReport, SFTDataset, build_sft_dataset
from fastpeft.data.split import Split, leak_warning, leaks, split_dataset
from fastpeft.data.template import RowTemplate
from fastpeft.data.token_cache import cached_preference_dataset, cached_prompt_dataset, cached_sft_dataset

__all__ = [
    "IGNORE_INDEX",
    "Comparison",
    "ComputedShuffle",
    "DataReport",
    "LengthGrouped",
    "Message",
    "MixedDataset",
    "PackedDataset",
    "PreferenceCollator",
    "PreferenceDataset",
    "PreferenceReport",
    "PromptDataset",
    "PromptReport",
    "Record",
    "RowTemplate",
    "SFTCollator",
    "SFTDataset",
    "Split",
    "build_preference_dataset",
    "build_prompt_dataset",
    "build_sft_dataset",
    "cached_preference_dataset",
    "cached_prompt_dataset",
    "cached_sft_dataset",
    "encode_prompt",
    "leak_warning",
    "leaks",
    "load_records",
    "pack",
    "parse_comparison",
    "read_records",
    "shuffled",
    "split_dataset",
    "stop_token_ids",
]
