"""Tests of moe_peft; the folders mirror the package."""
