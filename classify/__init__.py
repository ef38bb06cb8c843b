"""Sentiment of film reviews: BERT adapted with LoRA, our own or PEFT's, trained on IMDB.

`tinylab classify fit | validate | test | predict --config configs/classify/demo.yaml`
"""
