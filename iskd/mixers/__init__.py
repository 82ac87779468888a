"""Mixers: what can stand where a block's attention stood. One idea per file, one yaml per mixer in conf/mixer."""
