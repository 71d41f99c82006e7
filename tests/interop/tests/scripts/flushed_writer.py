"""Writes that must survive the death of the server.

flushed_writer.py write URI STATE SEED     writes until the connection breaks, then records what must be there
flushed_writer.py verify URI STATE         reads everything and compares

Every sector carries the number of its 4 KiB block and of the write that it came from. When a flush is answered, the
writes answered before it was sent are durable: their blocks must show them, or a write sent later.
"""
import json
import random
import struct
import sys

import nbd

BLOCK, SECTOR = 4096, 512
mode, uri, state_path = sys.argv[1:4]
try:
    with open(state_path) as file:
        state = json.load(file)
except FileNotFoundError:
    state = {"next": 1, "flushes": 0, "blocks": {}}
# Block -> the writes that it may show, the durable one first; no entry: zeroes.
allowed = {int(block): numbers for block, numbers in state["blocks"].items()}


def content(block, number):
    return struct.pack("<QQ", block, number) * (SECTOR // 16) * (BLOCK // SECTOR)


def save():
    state["blocks"] = allowed
    with open(state_path, "w") as file:
        json.dump(state, file)


def verify():
    handle = nbd.NBD()
    handle.connect_uri(uri)
    size, step = handle.get_size(), 1 << 20
    for start in range(0, size, step):
        data = handle.pread(min(step, size - start), start)
        for at in range(0, len(data), BLOCK):
            block = (start + at) // BLOCK
            numbers = allowed.get(block, [0])
            shown = set()
            for sector in range(at, at + BLOCK, SECTOR):
                piece = data[sector:sector + SECTOR]
                tag, number = struct.unpack_from("<QQ", piece)
                if number == 0:
                    assert not any(piece), f"block {block}: a sector that nobody wrote"
                else:
                    assert piece == content(block, number)[:SECTOR], f"block {block}: a sector that nobody wrote"
                assert number in numbers, f"block {block} shows write {number}, may show {numbers}"
                shown.add(number)
            # What is shown now is durable after the flush below, and the next round's start.
            if len(shown) == 1:
                number = shown.pop()
                if number:
                    allowed[block] = [number]
                else:
                    allowed.pop(block, None)
    handle.flush()
    handle.shutdown()
    save()
    print(f"{len(allowed)} blocks written, {state['flushes']} flushes answered so far")


def write():
    rng = random.Random(int(sys.argv[4]))
    handle = nbd.NBD()
    try:
        handle.connect_uri(uri)
    except nbd.Error:
        # Killed before we came, on a slow machine. The test counts flushes, so that not all rounds can pass like this.
        save()
        return
    blocks = handle.get_size() // BLOCK
    busy = set()
    answered = []  # (block, number) of writes answered since the last flush was sent
    flushing = None  # what becomes durable with the flush under way
    under_way = 0

    def issue_write():
        nonlocal under_way
        start, count = rng.randrange(blocks), rng.choice([1, 1, 1, 2, 4, 16])
        span = range(start, min(start + count, blocks))
        if any(block in busy for block in span):
            return
        number = state["next"]
        state["next"] += 1
        data = b"".join(content(block, number) for block in span)
        buffer = nbd.Buffer.from_bytearray(bytearray(data))
        busy.update(span)
        for block in span:
            allowed.setdefault(block, [0]).append(number)

        def done(error):
            nonlocal under_way
            under_way -= 1
            if error.value == 0:
                busy.difference_update(span)
                answered.extend((block, number) for block in span)
            return 1

        under_way += 1
        handle.aio_pwrite(buffer, start * BLOCK, completion=done)

    def issue_flush():
        nonlocal under_way, flushing, answered
        flushing, answered = answered, []

        def done(error):
            nonlocal under_way, flushing
            under_way -= 1
            if error.value == 0:
                state["flushes"] += 1
                for block, number in flushing:
                    numbers = allowed[block]
                    if number in numbers:
                        del numbers[:numbers.index(number)]
            flushing = None
            return 1

        under_way += 1
        handle.aio_flush(completion=done)

    try:
        while True:
            while under_way < 16:
                if flushing is None and rng.random() < 0.05:
                    issue_flush()
                else:
                    issue_write()
            handle.poll(-1)
    except nbd.Error:
        save()


{"write": write, "verify": verify}[mode]()
