"""The demo: every part of SFD trained on the digits, sampled, judged and drawn, in stages that a folder remembers."""
