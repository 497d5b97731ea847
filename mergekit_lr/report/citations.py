"""The papers behind methods and verbs, and their BibTeX.

A method names its paper by arXiv id, DOI or a word (``mergekit``, ``PEFT``, ``Eckart-Young``): the keys of ``PAPERS``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

EXTRACT, COMPRESS = "2509.10971", "2602.10993"
SPACES = {"core": "2509.17786", "knots": "2410.19735"}


class Paper(NamedTuple):
    """title, authors and year as published. source: the other fields of a BibTeX entry; arXiv's come from the key."""

    title: str
    authors: str
    year: int
    source: dict[str, str] | None = None


PAPERS = {
    EXTRACT: Paper(
        "PHLoRA: data-free Post-hoc Low-Rank Adapter extraction from full-rank checkpoint",
        "Bhoomit Vasani, Jack FitzGerald, Anjie Fang, Sushmit Vaish",
        2025,
    ),
    COMPRESS: Paper(
        "LoRA-Squeeze: Simple and Effective Post-Tuning and In-Tuning Compression of LoRA Modules",
        "Ivan Vulić, Adam Grycner, Quentin de Laroussilhe, Jonas Pfeiffer",
        2026,
    ),
    SPACES["core"]: Paper(
        "Accurate and Efficient Low-Rank Model Merging in Core Space",
        "Aniello Panariello, Daniel Marczak, Simone Magistri, Angelo Porrello, Bartłomiej Twardowski, "
        "Andrew D. Bagdanov, Simone Calderara, Joost van de Weijer",
        2025,
    ),
    SPACES["knots"]: Paper(
        "Model merging with SVD to tie the Knots",
        "George Stoica, Pratik Ramesh, Boglarka Ecsedi, Leshem Choshen, Judy Hoffman",
        2024,
    ),
    "2203.05482": Paper(
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference "
        "time",
        "Mitchell Wortsman, Gabriel Ilharco, Samir Yitzhak Gadre, Rebecca Roelofs, Raphael Gontijo-Lopes, "
        "Ari S. Morcos, Hongseok Namkoong, Ali Farhadi, Yair Carmon, Simon Kornblith, Ludwig Schmidt",
        2022,
    ),
    "2212.04089": Paper(
        "Editing Models with Task Arithmetic",
        "Gabriel Ilharco, Marco Tulio Ribeiro, Mitchell Wortsman, Suchin Gururangan, Ludwig Schmidt, "
        "Hannaneh Hajishirzi, Ali Farhadi",
        2022,
    ),
    "2306.01708": Paper(
        "TIES-Merging: Resolving Interference When Merging Models",
        "Prateek Yadav, Derek Tam, Leshem Choshen, Colin Raffel, Mohit Bansal",
        2023,
    ),
    "2311.03099": Paper(
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        "Le Yu, Bowen Yu, Haiyang Yu, Fei Huang, Yongbin Li",
        2023,
    ),
    "2312.06795": Paper(
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        "MohammadReza Davari, Eugene Belilovsky",
        2023,
    ),
    "2312.13558": Paper(
        "The Truth is in There: Improving Reasoning in Language Models with Layer-Selective Rank Reduction",
        "Pratyusha Sharma, Jordan T. Ash, Dipendra Misra",
        2023,
    ),
    "2403.19522": Paper(
        "Model Stock: All we need is just a few fine-tuned models",
        "Dong-Hwan Jang, Sangdoo Yun, Dongyoon Han",
        2024,
    ),
    "2406.11617": Paper(
        "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
        "Pala Tej Deep, Rishabh Bhardwaj, Soujanya Poria",
        2024,
    ),
    "2408.07990": Paper(
        "FuseChat: Knowledge Fusion of Chat Models",
        "Fanqi Wan, Longguang Zhong, Ziyi Yang, Ruijun Chen, Xiaojun Quan",
        2024,
    ),
    "2409.16167": Paper(
        "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise Clustering",
        "Ziyu Zhao, Tao Shen, Didi Zhu, Zexi Li, Jing Su, Xuwu Wang, Kun Kuang, Fei Wu",
        2024,
    ),
    "2412.00081": Paper(
        "Task Singular Vectors: Reducing Task Interference in Model Merging",
        "Antonio Andrea Gargiulo, Donato Crisostomi, Maria Sofia Bucarelli, Simone Scardapane, Fabrizio Silvestri, "
        "Emanuele Rodolà",
        2024,
    ),
    "2412.12153": Paper(
        "Revisiting Weight Averaging for Model Merging",
        "Jiho Choi, Donggyun Kim, Chanhyuk Lee, Seunghoon Hong",
        2024,
    ),
    "2501.09522": Paper(
        "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging",
        "Anke Tang, Enneng Yang, Li Shen, Yong Luo, Han Hu, Bo Du, Dacheng Tao",
        2025,
    ),
    "2502.04959": Paper(
        "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
        "Daniel Marczak, Simone Magistri, Sebastian Cygert, Bartłomiej Twardowski, Andrew D. Bagdanov, "
        "Joost van de Weijer",
        2025,
    ),
    "2503.22178": Paper(
        "AdaRank: Adaptive Rank Pruning for Enhanced Model Merging",
        "Chanhyuk Lee, Jiho Choi, Chanryeol Lee, Donggyun Kim, Seunghoon Hong",
        2025,
    ),
    "2601.13572": Paper(
        "Behavior Knowledge Merge in Reinforced Agentic Models",
        "Xiangchi Yuan, Dachuan Shi, Chunhui Zhang, Zheyuan Liu, Shenglong Yao, Soroush Vosoughi, Wenke Lee",
        2026,
    ),
    "10.1002/cpa.3160300502": Paper(
        "Riemannian center of mass and mollifier smoothing",
        "Hermann Karcher",
        1977,
        {"journal": "Communications on Pure and Applied Mathematics", "doi": "10.1002/cpa.3160300502"},
    ),
    "10.1145/325334.325242": Paper(
        "Animating rotation with quaternion curves",
        "Ken Shoemake",
        1985,
        {"booktitle": "SIGGRAPH", "doi": "10.1145/325334.325242"},
    ),
    "Eckart-Young": Paper(
        "The approximation of one matrix by another of lower rank",
        "Carl Eckart, Gale Young",
        1936,
        {"journal": "Psychometrika", "doi": "10.1007/BF02288367"},
    ),
    "PEFT": Paper(
        "PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods",
        "Sourab Mangrulkar, Sylvain Gugger, Lysandre Debut, Younes Belkada, Sayak Paul, Benjamin Bossan",
        2022,
        {"url": "https://github.com/huggingface/peft"},
    ),
    "mergekit": Paper(
        "Arcee's MergeKit: A Toolkit for Merging Large Language Models",
        "Charles Goddard, Shamane Siriwardhana, Malikeh Ehghaghi, Luke Meyers, Vlad Karpukhin, Brian Benedict, "
        "Mark McQuade, Jacob Solawetz",
        2024,
        {"eprint": "2403.13257", "archivePrefix": "arXiv"},
    ),
}


def bibtex(papers: Iterable[str]) -> str:
    """BibTeX entries of the papers with these keys, each once, in order.

    Raises:
        KeyError: a key that ``PAPERS`` does not have.
    """
    return "\n\n".join(_entry(key, PAPERS[key]) for key in dict.fromkeys(papers))


def _entry(key: str, paper: Paper) -> str:
    source = paper.source or {"eprint": key, "archivePrefix": "arXiv"}
    kind = "article" if "journal" in source else "inproceedings" if "booktitle" in source else "misc"
    first, word = paper.authors.partition(",")[0].split()[-1], paper.title.split()[0]
    name = unicodedata.normalize("NFKD", f"{first}{paper.year}{word}").encode("ascii", "ignore").decode()
    # A second pair of braces keeps the capitals of a title.
    fields = {"title": f"{{{paper.title}}}", "author": " and ".join(paper.authors.split(", ")), "year": str(paper.year)}
    lines = [f"  {field} = {{{value}}}," for field, value in (fields | source).items()]
    return "\n".join((f"@{kind}{{{re.sub('[^a-z0-9]', '', name.lower())},", *lines, "}"))
