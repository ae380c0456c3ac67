"""Tests run on the CPU, where the same seed gives the same bits."""
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
