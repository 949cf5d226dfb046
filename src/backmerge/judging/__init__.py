"""Judges: was the request refused, and is the answer harmful?"""
