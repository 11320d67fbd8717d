"""Results on their way: from the ledger to destinations, until each has arrived or is named with the reason.

policy      pure: what an answer means, and when to try again
encoding    which transfer syntaxes are proposed, and how an instance is brought into one that was accepted
sending     the due rows of one destination over several associations
commitment  Storage Commitment SCU
queries     what a destination has, and telling others that results are there
stow        STOW-RS instead of C-STORE
service     a thread for each destination
"""

from dicomnode.delivery.service import DeliveryService

__all__ = ["DeliveryService"]
