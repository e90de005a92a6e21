"""Latency, memory, fidelity and accuracy of artifacts, beside the BF16 H100 baseline.

A room imports from itself and from the rooms before it in this list, which a test reads:

    common       what can be measured, the machine, results files, the terminal's table
    processes    work in processes of their own
    fidelity     how far an artifact is from its checkpoint
    devices      what a device allows
    accuracy     questions, answers and grades
    latency      speed and memory of open models
    gpu          Fox-1's shape on one graphics card, against its floors
    arm          exports really run on ARM processors, emulated
    report       what was found, told
    sweep        many exports, measured and questioned

The files beside them import from any room, and no room imports from them: studies, each run as
`python -m benchmarks.NAME`, whose commands stand in the results files (results/), and demo.py and study.py,
which join everything.
"""
