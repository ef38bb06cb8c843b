"""Sentiment of film reviews: BERT adapted by LoRA, written by hand and from PEFT, trained on IMDB.

`tinylab classify fit | validate | test | predict --config configs/classify/demo.yaml`
"""
