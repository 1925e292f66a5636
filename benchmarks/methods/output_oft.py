"""OFT and BOFT on the output."""

from __future__ import annotations

NOT_TIMED = {
    "OutputOFTConfig": "PEFT has no rotations of outputs; the suite of LyCORIS, which has them, times that arithmetic"
}
