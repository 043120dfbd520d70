"""The tables of the MADE and MAF papers, made again on the data that can be had."""
