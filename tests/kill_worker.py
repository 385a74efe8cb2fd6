"""A process that test_kills.py kills: saves a pipeline again and again, its weights all of one number each time."""

import sys
from itertools import count
from pathlib import Path

import torch
from tiny import pipeline

from tokenizers_vq.files import write_text_atomically

pipe = pipeline(family="ar")
for number in count(int(sys.argv[2]) + 1):
    with torch.no_grad():
        for parameter in (*pipe.network.parameters(), *pipe.tokenizer.parameters()):
            parameter.fill_(number)
    pipe.save_pretrained(Path(sys.argv[1]))
    write_text_atomically(str(number), Path(sys.argv[1]) / "saved")
