"""DICOM-native PACS node: the map of this package.

    instance received   listener      sockets, threads, timers; upperlayer, pdu, dimse, negotiation: pure, protocol
      → sealed          intake        content, name and journal record durable with one fsync (archive, spool); only
                                      now the answer 0x0000
      → indexed         indexer       a process of its own: header read, file moved, commit; or quarantine, and why
    series complete     completion    pure: open associations, quiet period, promised counts, gaps
                        counts        how many instances PACS sources hold of it, asked in a thread
      → volumes         volumes       pure: one series → its regular volumes, or the measured reason why there are none;
                        phases        pure: what tells the volumes of one series apart, and their order
      → pairs           pairing       pure: rules + complete volumes → pairs, and for the rest the reason
      → job             workflow      pair and durable job in one transaction
    job claimed         workflow      in the worker process
      → registration    registering   registration_engine.register; job_folder: what lies from one step to the next
      → verdict         quality       pure: figures and maps of one registration, on the field that is delivered
                        uptake        pure: curves of a dynamic series' regions, before and after
                        verdict       pure: accept · warn · reject
      → objects         products      every object of every pair of the job that was not rejected
                        objects       pure: registered series, SRO, DSR, reports, maps …; UIDs derived from the inputs
      → handed over     handover      approval, rejection notes about what former jobs had sent
      → deliveries      index         one row per (instance, destination)
    delivered           delivery      sent until it has arrived or is named; scu: the associations that we open

    config, document, rules, outputs, conditions, vocabulary, derived   what an administrator writes, and what it means
    model, remotes                                             the values that travel; whom the node speaks to
    scopes, partners → findings → reasons, trace               what a rule looks among, what it saw, and in words
    priors fetched      retrieve      C-FIND, C-MOVE or C-GET, QIDO and WADO, for rules that need an earlier examination

    reproduce           a job's results once more, into a folder, and what differs

    commitment          Storage Commitment SCP

    scheduler           reads the index, asks the pure rooms, writes what they decided
    service             supervises all of it; cli wires it together; account: who gives a command
    demo, phantom, anatomy   `dicomnode demo`: a generated study through the whole line

Rooms of the shell (listener, scheduler, steps, delivery) meet in the index and never import each other.
"""
