"""The tables of the paper, as printed, misprints included, so that a result can be put beside them.

Kito, Makino, Miwa, Sasaki (Toyota Technological Institute): "LoRA fine-tuning of large language models for
named-entity recognition: a study of training settings" (in Japanese). All on BC5CDR; F1 in percent.
"""

SPLITS = ("train", "dev", "test")
RANKS = (2, 4, 8, 64, 128)
TARGETS = ("q", "q,k", "q,k,v", "q,k,v,o", "all")

# tagging, Chemical only, LoRA on all layers, r=8, development split: (model, prompt, F1, standard deviation)
TABLE1 = (
    ("Llama-2-chat-7B", True, 93.1, 0.3),
    ("Llama-2-chat-7B", False, 93.4, 0.2),
    ("Llama-2-7B", False, 93.6, 0.4),
)

# Llama-2-7B, LoRA on all layers, r=8, input sentence only, development split: (format, labels) -> (F1, deviation)
TABLE2 = {
    ("tagging", "per-label"): (88.6, 0.6),
    ("tagging", "all"): (88.4, 0.6),
    ("extraction", "per-label"): (85.8, 0.4),
    ("extraction", "all"): (86.5, 0.1),
}

# Llama-2-7B, tagging, all labels, development split: targets -> F1 at each of RANKS
TABLE3 = {
    "q": (68.3, 69.1, 65.3, 66.9, 68.0),
    "q,k": (64.3, 61.5, 59.6, 60.3, 60.6),
    "q,k,v": (88.3, 88.4, 89.1, 88.2, 88.2),
    "q,k,v,o": (88.4, 89.0, 88.8, 88.3, 88.6),
    "all": (89.2, 89.4, 89.0, 89.4, 89.5),
}

# test split: (method, model, F1); BINDER is the state of the art that the paper cites
TABLE4 = (
    ("LoRA (all, r=128)", "Llama-2-7B", 88.9),
    ("Full fine-tuning", "Llama-2-7B", 89.3),
    ("BINDER (state of the art, cited)", "PubMedBERT-base", 91.9),
)

# mentions: label -> at each of SPLITS
TABLE5 = {"Disease": (4182, 4244, 4424), "Chemical": (5203, 5347, 5385)}

# answers to this input: (format, labels) -> answer
TABLE6_INPUT = "Mesna significantly reduces IFO 's genotoxicity"
TABLE6_MENTIONS = {"Mesna": "Chemical", "IFO": "Chemical", "genotoxicity": "Disease"}
TABLE6 = {
    ("tagging", "Disease"): "Mesna significantly reduces IFO 's @@genotoxicity##",
    ("tagging", "Chemical"): "@@Mesna## significantly reduces @@IFO## 's genotoxicity",
    ("tagging", "all"): (
        "[Chemical]Mesna[/Chemical] significantly reduces [Chemical]IFO[/Chemical] 's [Disease]genotoxicity[/Disease]"
    ),
    ("extraction", "Disease"): "genotoxicity",
    ("extraction", "Chemical"): "Mesna, IFO",
    ("extraction", "all"): "Disease: genotoxicity; Chemical: Mesna, IFO",
}

# Llama-2-7B: targets -> trainable parameters at each of RANKS. `audit --table7` finds the misprints.
TABLE7 = {
    "q": (524_288, 1_048_576, 2_097_152, 16_777_216, 33_554_432),
    "q,k": (1_048_576, 2_097_152, 4_194_304, 50_331_648, 67_108_864),
    "q,k,v": (1_572_864, 3_145_728, 6_291_456, 6_291_456, 100_663_296),
    "q,k,v,o": (2_097_152, 4_194_304, 8_388_608, 67_108_864, 134_217_728),
    "all": (5_141_504, 10_283_008, 20_566_016, 164_528_128, 329_056_256),
}

# LoRA on all layers with r=128 against full fine-tuning of Llama-2-7B
TABLE8 = {
    "lora": {"trainable": 329_056_256, "gpus": "4 x V100 16 GB", "storage": "3.7GB", "hours_per_epoch": 2.5},
    "full": {"trainable": 6_738_415_616, "gpus": "8 x A100 40 GB", "storage": "26.3GB", "hours_per_epoch": 2.7},
}
