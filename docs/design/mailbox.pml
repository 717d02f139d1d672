/*
 * Grants over the mailbox, between draft and verifier, for the model checker SPIN.
 *
 *   spin -a mailbox.pml && gcc -O1 -DCOLLAPSE -DNOFAIR -o pan pan.c && ./pan -m20000 -a
 *
 * One mailbox is followed through GRANTS grants of ROUNDS rounds: a slot each way
 * (shared/link/mailbox.py), a bell each way (shared/link/doorbell.py), the two sides
 * (draft_service/host_rounds.py and verify_service/host_rounds.py), and the coordinator that
 * grants, interrupts and waits.
 *
 * Memory promises nothing: the parts of a slot arrive one by one in any order, and a slot may be
 * read while it is being written, since a ring of an earlier grant may have been heard. Only a
 * ring orders what was written before it and what is read after it. Any round may be the last
 * one (a stop token, a refusal, the coordinator's word), the draft may be interrupted and the
 * verifier may lose patience at any moment, however late the draft then rings; and FAULTS times
 * a process dies, or is given up by the other one because it stands still.
 *
 * Checked: what is applied was made for this grant and this turn, and so was what ends a grant;
 * no side takes the other for one that breaks the protocol; both leave every grant, so that
 * nobody waits after ENDS.
 *
 * -DMUTATE_...  one rule is broken; the checker must object.
 */

#ifndef GRANTS
#define GRANTS 2
#endif
#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifndef FAULTS
#define FAULTS 1
#endif

#define TURNS (ROUNDS + 1)                      /* a side may leave one turn after the last */
#define TURN(grant, step) ((grant) * TURNS + (step))   /* grant and step of a head, in order */
#define GRANT(turn) ((turn) / TURNS)
#define NOTHING 0                               /* a body without entries */
#define CHECKSUM(turn, ends, body) (1 + ((turn) * 2 + (ends)) * TURN(GRANTS + 1, 0) + (body))

/* A slot: its head, its entries, and the checksum before them. */
typedef Slot {
    byte turn;
    bit ends;
    byte body;          /* the turn that the entries were made for */
    short seal
};
Slot proposals, verdicts;

/* A ring is a byte on the socket. One look takes all that are there, so one is like many. */
chan at_verifier = [1] of { bit };
chan at_draft = [1] of { bit };

/* Whether the side holds the mailbox; the kernel tells the other one when it does not. */
bool draft_holds = true, verifier_holds = true;
bool draft_gone = false, verifier_gone = false; /* the process */

mtype = { OVER, PEER };                         /* how a side's grant ended */
chan grant_draft = [1] of { byte };
chan grant_verifier = [1] of { byte };
chan draft_says = [1] of { mtype };
chan verifier_says = [1] of { mtype };
byte stop_draft;                                /* grant that the coordinator's word ends */
byte faults = FAULTS;
bool done = false;

/* ---- a slot and its bell ------------------------------------------------------------- */

/* It dies; or, where it listens: the other side's beat does not rise, and it is given up. */
#define FAULT faults > 0 && !done -> faults--

#define RING(bell, other_holds)                                                         \
    if                                                                                  \
    :: !other_holds -> goto gone                                                        \
    :: other_holds && len(bell) == 0 -> bell ! 1                                        \
    :: other_holds && len(bell) == 1                                                    \
    fi

#define T 1
#define E 2
#define B 4
#define S 8
#define RINGS 16

/*
 * Writes a slot, its parts one by one in any order, and rings. While no ring is on its way
 * nobody looks before the writer's own, so that the order can't be told: all is one step then.
 */
inline tell(slot, bell, other_holds, new_ends, new_turn, new_body) {
    if
    :: FAULT; goto dies
    :: atomic { len(bell) == 0 ->
        d_step { slot.turn = new_turn; slot.ends = new_ends; slot.body = new_body;
                 slot.seal = CHECKSUM(new_turn, new_ends, new_body) };
        RING(bell, other_holds)
       }
    :: atomic { len(bell) > 0 -> left = T + E + B + S + RINGS }
    fi;
    do
    :: left == 0 -> break
    :: d_step { left & T -> slot.turn = new_turn; left = left - T }
    :: d_step { left & E -> slot.ends = new_ends; left = left - E }
    :: d_step { left & B -> slot.body = new_body; left = left - B }
    :: d_step { left & S -> slot.seal = CHECKSUM(new_turn, new_ends, new_body);
                left = left - S }
    :: atomic { left == RINGS -> left = 0; RING(bell, other_holds) }
    :: left > 0 && FAULT; goto dies
    od
}

/* Hears the rings and takes a copy. Mixtures of old and new come from the writer's steps. */
#define LOOK(bell, slot)                                                                \
    d_step { len(bell) > 0 -> bell ? _;                                                 \
             turn = slot.turn; ends = slot.ends; body = slot.body; seal = slot.seal }
#define FORGET turn = 0; ends = 0; body = 0; seal = 0

#ifdef MUTATE_NO_HANG_UP
#define HUNG_UP(bell, other_holds) false
#else
#define HUNG_UP(bell, other_holds) (!other_holds && len(bell) == 0)  /* rings are heard first */
#endif

#ifdef MUTATE_NO_SEAL
#define SEALED(slot) true
#else
#ifdef MUTATE_SEAL_OF_ANOTHER_LOOK
#define SEALED(slot) (slot.seal == CHECKSUM(slot.turn, slot.ends, slot.body))
#else
#define SEALED(slot) (seal == CHECKSUM(turn, ends, body))
#endif
#endif

#ifdef MUTATE_NO_TURN_CHECK
#define MINE true
#else
#define MINE (turn == TURN(grant, step))
#endif

/* In a later turn of this grant the other side has left and did not wait for us. */
#ifdef MUTATE_NO_EARLY_LEAVE
#define LEFT false
#else
#define LEFT (turn > TURN(grant, step) && GRANT(turn) == grant && ends && body == NOTHING)
#endif

/* What was heard is not for this turn: over, or left over from an earlier one. */
#define OTHERWISE(slot)                                                                 \
    :: !SEALED(slot) -> d_step { FORGET }; goto listen      /* its own ring is to come */   \
    :: SEALED(slot) && !MINE && LEFT -> goto over                                       \
    :: SEALED(slot) && !MINE && !LEFT ->                                                \
        assert(turn < TURN(grant, step));                                               \
        d_step { FORGET }; goto listen

/* ---- the draft ----------------------------------------------------------------------- */

active proctype Draft() {
    byte grant, step, left, turn, body;
    bit ends, leaves;
    short seal;

end:
    do
    :: FAULT; goto dies
    :: atomic { grant_draft ? grant;
        if
        :: !draft_holds -> draft_says ! PEER; goto next
        :: draft_holds
        fi };
propose:
        if              /* its last word: it was interrupted, or the engine refused a sequence */
        :: leaves = 1
        :: leaves = 0
        fi;
        tell(proposals, at_verifier, verifier_holds, leaves, TURN(grant, step), TURN(grant, step));
        if
        :: leaves -> goto over
        :: !leaves
        fi;
listen:
        if
        :: LOOK(at_draft, verdicts)
        :: stop_draft == grant -> goto leave
        :: HUNG_UP(at_draft, verifier_holds) -> goto gone
        :: FAULT; goto gone
        :: FAULT; goto dies
        fi;
        if
        OTHERWISE(verdicts)
        :: SEALED(verdicts) && MINE ->
            assert(GRANT(turn) == grant);
#ifndef MUTATE_ENDS_IGNORED
            if
            :: ends -> goto over
            :: !ends
            fi;
#endif
            assert(body == TURN(grant, step));      /* a verdict on this very proposal */
            d_step { FORGET; step++ };
            goto propose
        fi;
leave:
        tell(proposals, at_verifier, verifier_holds, 1, TURN(grant, step + 1), NOTHING);
over:
        if
        :: atomic { draft_says ! OVER; goto next }
        :: FAULT; goto dies
        fi;
gone:
        atomic { draft_holds = false; draft_says ! PEER };
next:
        skip;
        d_step { FORGET; left = 0; leaves = 0; step = 0; grant = 0 }
    od;
dies:
    skip;
    d_step { draft_gone = true; draft_holds = false;
             FORGET; left = 0; leaves = 0; step = 0; grant = 0 }
}

/* ---- the verifier -------------------------------------------------------------------- */

active proctype Verifier() {
    byte grant, step, left, turn, body;
    bit ends, last;
    short seal;

end:
    do
    :: FAULT; goto dies
    :: grant_verifier ? grant;
listen:
        if
        :: LOOK(at_verifier, proposals)
        :: HUNG_UP(at_verifier, draft_holds) -> goto gone
        :: FAULT; goto gone
        :: FAULT; goto dies
        :: goto late                                /* its patience is at an end */
        fi;
        if
        OTHERWISE(proposals)
        :: SEALED(proposals) && MINE ->
            assert(GRANT(turn) == grant);
            if
            :: ends && body == NOTHING -> goto over /* the draft has left */
            :: !(ends && body == NOTHING)
            fi;
            assert(body == TURN(grant, step))       /* what was proposed for this turn */
        fi;
        if              /* the last round: a stop token, a refusal, the coordinator's word, ... */
        :: last = 1
        :: !ends && step + 1 < ROUNDS -> last = 0   /* ... or else by its number or the draft's */
        fi;
        d_step { FORGET };
#ifdef MUTATE_NO_ENDS
        tell(verdicts, at_draft, draft_holds, 0, TURN(grant, step), TURN(grant, step));
#else
        tell(verdicts, at_draft, draft_holds, last, TURN(grant, step), TURN(grant, step));
#endif
        if
        :: last -> goto over
        :: !last -> step++; goto listen
        fi;
late:
#ifndef MUTATE_LATE_WITHOUT_A_WORD
        tell(verdicts, at_draft, draft_holds, 1, TURN(grant, step), NOTHING);
#endif
over:
        if
        :: atomic { verifier_says ! OVER; goto next }
        :: FAULT; goto dies
        fi;
gone:
        atomic { verifier_holds = false; verifier_says ! PEER };
next:
        skip;
        d_step { FORGET; left = 0; last = 0; step = 0; grant = 0 }
    od;
dies:
    skip;
    d_step { verifier_gone = true; verifier_holds = false;
             FORGET; left = 0; last = 0; step = 0; grant = 0 }
}

/* ---- the coordinator ----------------------------------------------------------------- */

active proctype Coordinator() {
    byte grant;
    bool usable = true;                             /* the mailbox */
    bool may_stop;
    mtype how;

    if                                              /* fewer faults will do */
    :: faults > 0 -> faults--
    :: true
    fi;
    do
    :: grant == GRANTS || !usable -> break
    :: grant < GRANTS && usable ->
        atomic {                                    /* a process that is gone is sent nothing */
            grant++;
            if
            :: draft_gone || verifier_gone -> break
            :: !draft_gone && !verifier_gone ->
                grant_draft ! grant; grant_verifier ! grant
            fi;
            if                                      /* it need not come to the draft's help */
            :: may_stop = true
            :: may_stop = false
            fi
        };
        do
        :: may_stop && stop_draft != grant -> stop_draft = grant   /* its stream ended, say */
        :: atomic { verifier_says ? how -> usable = (how == OVER); how = 0; break }
        :: atomic { verifier_gone && len(verifier_says) == 0 ->
            usable = false; stop_draft = grant; break }     /* no verifier would tell it */
        od;
        do
        :: may_stop && stop_draft != grant -> stop_draft = grant
        :: draft_says ? _ -> break
        :: draft_gone && len(draft_says) == 0 -> usable = false; break
        od
    od;
    /* Both have answered every grant, or are gone: nobody waits. */
    done = true
}

ltl every_grant_ends { <> done }
