"""Records -> checked rows -> token batches: JSON Lines reading, chat templates, loss masks, collators."""

from fastpeft.data.collator import SFTCollator
from fastpeft.data.records import Message, Record, load_records, read_records
from fastpeft.data.sft import IGNORE_INDEX, DataReport, SFTDataset, build_sft_dataset, encode_prompt, stop_token_ids

__all__ = [
    "IGNORE_INDEX",
    "DataReport",
    "Message",
    "Record",
    "SFTCollator",
    "SFTDataset",
    "build_sft_dataset",
    "encode_prompt",
    "load_records",
    "read_records",
    "stop_token_ids",
]
