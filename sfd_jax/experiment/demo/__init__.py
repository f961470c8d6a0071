"""The demo: train every part of SFD on digits or your own images, sample, judge and draw, in resumable stages."""
