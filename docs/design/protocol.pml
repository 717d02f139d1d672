/*
 * The protocol between the coordinator, the draft and the verifier, for the model checker SPIN.
 *
 *   spin -a protocol.pml && gcc -O1 -DCOLLAPSE -DNOFAIR -o pan pan.c && ./pan -a
 *
 * One sequence is followed from its prompt to its last token over one of two networks:
 *
 *   default     hostile: any message may be lost, repeated or overtaken, the coordinator may
 *               lose patience at any time and say the same again, and either service may crash
 *               and come back empty. It believes of a service only what was answered.
 *   -DSTREAM    the gRPC stream that the code uses: in order, nothing repeated, nothing lost
 *               but by the end of the stream, which frees what the service held. Here the
 *               coordinator notes what the draft holds when it *sends* (drafting.py), lets the
 *               draft catch up beside the verifier and goes on without a late proposal.
 *
 * Every fault but overtaking takes one unit of FAULTS. Tokens are bits. A KV slot holds the
 * whole history it was computed from, so that a slot which is stale, unwritten, or computed
 * behind a rejected proposal is told apart from the right one even where the token happens to
 * be the same. KV is never cleared: only `valid` says what may be read, as in the arena.
 *
 * Bounds (-D):  NEW tokens to generate, KMAX draft tokens, FAULTS.
 * -DANY_RULE    the verifier's choice is free instead of a function of the history: covers
 *               `rejection`, where it depends on the proposal too.
 * -DMUTATE_...  one rule of the protocol is broken; the checker must object.
 */

#ifndef NEW
#define NEW 3
#endif
#ifndef KMAX
#define KMAX 2
#endif
#ifndef FAULTS
#define FAULTS 2
#endif

#define PROMPT 1                    /* tokens */
#define FIRST 1                     /* the prompt's bits */
#define END (PROMPT + NEW)          /* log length that ends the request */
#define SLOTS (END + KMAX)          /* prompt + max_new_tokens + K_max; the bonus has no KV */
#define QUEUE (FAULTS + 2)          /* one message, repeated or sent again FAULTS times */

#define LOW(bits, len) ((bits) & ((1 << (len)) - 1))
#define CODE(bits, len) ((1 << (len)) | LOW(bits, len))   /* a history of `len` tokens; 0: none */

mtype = { ANSWER, UNKNOWN, STALE, KV_MISSING };

/* round, epoch, open, base_len, committed_len, log[base_len:] then the proposal, k */
chan to_draft = [QUEUE] of { byte, byte, bit, byte, byte, short, byte };
chan to_verify = [QUEUE] of { byte, byte, bit, byte, byte, short, byte };
/* kind, round, epoch, proposed bits, ghost: the history proposed from */
chan from_draft = [QUEUE] of { mtype, byte, byte, byte, short };
/* kind, round, epoch, num_accepted, next_token, ghost: the history and proposal judged */
chan from_verify = [QUEUE] of { mtype, byte, byte, byte, bit, short };

byte faults = FAULTS;
bool done = false;

/* One service's side of the sequence: epoch 0 is "not open". */
typedef Held {
    byte epoch;
    byte round;          /* the last one served in this epoch */
    byte valid;          /* valid_len: the one integer that a rollback sets */
    short kv[SLOTS]
};
Held draft, verifier;

/* ---- what both services do with a message -------------------------------------------- */

#ifdef STREAM
#define ANY_OF(channel, message) turn = 0; channel ? message
#else
/* Takes any message of the channel, not only the first: messages overtake each other. */
#define ANY_OF(channel, message)                                                        \
    turn = 0;                                                                           \
    do                                                                                  \
    :: turn + 1 < len(channel) -> channel ? message; channel ! message; turn++          \
    :: break                                                                            \
    od;                                                                                 \
    channel ? message
#endif

/* Opens, then decides whether the item may be served: `kind` is ANSWER if so, 0 to drop it. */
inline check(held) {
    kind = ANSWER;
    if
    :: open && epoch > held.epoch ->            /* a higher epoch frees the old extent */
        held.epoch = epoch; held.round = 0; held.valid = 0
    :: else
    fi;
    if
    :: held.epoch == 0 || epoch > held.epoch -> kind = UNKNOWN
#ifndef MUTATE_NO_EPOCH_CHECK
    :: held.epoch != 0 && epoch < held.epoch -> kind = STALE
#endif
    :: else ->
        if
#ifndef MUTATE_NO_ROUND_CHECK
            :: round <= held.round -> kind = 0      /* rounds rise within a stream */
#endif
#ifndef MUTATE_NO_KV_CHECK
        :: round > held.round && base > held.valid -> kind = KV_MISSING
#endif
        :: else
        fi
    fi
}

/* Rollback: one integer. The tokens before base stay, whatever lies behind is out of bounds. */
inline roll_back(held) {
#ifdef MUTATE_NO_ROLLBACK
    if
    :: base < held.valid -> base = held.valid; text = text >> (held.valid - base)
    :: else
    fi;
#endif
    held.round = round;
    held.valid = base
}

/* What attention sees in slots [0, valid): each must have been written under this history. */
inline read_prefix(held) {
    seen = 0; i = 0;
    do
    :: i < held.valid ->
        seen = seen | (((held.kv[i] >> i) & 1) << i);
        assert(held.kv[i] == CODE(seen, i + 1));    /* no hole, no leftover of another history */
        i++
    :: else -> break
    od
}

/* One row of a forward: its KV depends on everything before it. */
inline write_row(held, token) {
    assert(held.valid < SLOTS);                     /* never beyond the extent */
    seen = LOW(seen, held.valid) | ((token) << held.valid);
    held.kv[held.valid] = CODE(seen, held.valid + 1);
    held.valid++
}

inline write_rows(held, count) {
    i = 0;
    do
    :: i < (count) -> write_row(held, (text >> i) & 1); i++
    :: else -> break
    od
}

/* The base's own token after `seen[0:size]`: position and parity of the history decide. */
inline base_token(size) {
    bit_ = (size) & 1; i = 0;
    do
    :: i < (size) -> bit_ = bit_ ^ ((seen >> i) & 1); i++
    :: else -> break
    od
}

#define FORGET round = 0; epoch = 0; open = 0; base = 0; n = 0; text = 0; k = 0; \
    seen = 0; i = 0; kind = 0; turn = 0

/* ---- the services -------------------------------------------------------------------- */

active proctype Draft() {
    byte round, epoch, base, n, k, i, turn, offered;
    short text, seen;
    bit open, bit_;
    mtype kind;
end:
    do
    :: atomic {
        len(to_draft) > 0 -> ANY_OF(to_draft, round(epoch, open, base, n, text, k));
        d_step { check(draft) };
        if
        :: kind == ANSWER ->
            d_step { roll_back(draft); read_prefix(draft); write_rows(draft, n - base);
                     offered = 0; i = 0 };
            turn = 0;
            do      /* any draft whatever: each token is free. dK gets no KV in this round. */
            :: turn < k ->
                if
                :: bit_ = 0
                :: bit_ = 1
                fi;
                d_step {
                    offered = offered | (bit_ << turn);
                    turn++;
                    if
                    :: turn < k -> write_row(draft, bit_)
                    :: else
                    fi
                }
            :: else -> break
            od;
            from_draft ! ANSWER(round, epoch, offered, CODE(seen, n))
        :: kind == 0
        :: else -> from_draft ! kind(round, epoch, 0, 0)
        fi;
        d_step { FORGET; offered = 0; bit_ = 0 }
    }
    od
}

active proctype Verifier() {
    byte round, epoch, base, n, k, i, turn, accepted;
    short text, seen;
    bit open, bit_;
    mtype kind;
end:
    do
    :: atomic {
        len(to_verify) > 0 -> ANY_OF(to_verify, round(epoch, open, base, n, text, k));
        d_step { check(verifier) };
        if
        :: kind == ANSWER ->
            d_step { roll_back(verifier); read_prefix(verifier);
                     write_rows(verifier, n - base + k); accepted = 0 };
            do      /* the longest accepted prefix, then the base's own token */
            :: d_step { base_token(n + accepted) };
#ifdef ANY_RULE
                if
                :: bit_ = 0
                :: bit_ = 1
                fi;
#endif
                if
                :: accepted < k && ((seen >> (n + accepted)) & 1) == bit_ -> accepted++
                :: else -> break
                fi
            od;
            verifier.valid = n + accepted;
            from_verify ! ANSWER(round, epoch, accepted, bit_, CODE(seen, n + k))
        :: kind == 0
        :: else -> from_verify ! kind(round, epoch, 0, 0, 0)
        fi;
        d_step { FORGET; accepted = 0; bit_ = 0 }
    }
    od
}

/* ---- the coordinator ----------------------------------------------------------------- */

short log = FIRST;                  /* the truth */
byte n = PROMPT;                    /* committed_len */

/* What the coordinator knows of one service. */
typedef Link {
    byte epoch;
    byte round;
    byte base;                      /* tokens of the log whose KV is held there */
    bit open                        /* not yet answered in this epoch: say `open` again */
};
Link to_d, to_v;

inline reopen(link) {
#ifndef MUTATE_NO_REOPEN
    link.epoch++; link.round = 0; link.open = 1
#else
    skip
#endif
}

/* A message that opens begins at 0, whatever was noted of the service since it was lost. */
inline begin(link) {
    link.round++;
#ifndef MUTATE_KEEP_BASE_ON_REOPEN
    if
    :: link.open -> link.base = 0
    :: else
    fi
#endif
}

#ifdef MUTATE_NO_ANSWER_EPOCH_CHECK
#define SAME_EPOCH(link) true
#else
#define SAME_EPOCH(link) (epoch == link.epoch)
#endif
#ifdef MUTATE_NO_ANSWER_ROUND_CHECK
#define SAME_ROUND(link) true
#else
#define SAME_ROUND(link) (round == link.round)
#endif

/* Nothing more can come: the message or its answer was lost. */
#ifdef MUTATE_NO_TIMEOUT
#define LOST(there, back) false
#else
#define LOST(there, back) (len(there) == 0 && len(back) == 0)
#endif

#ifdef STREAM
/* A refusal of something that nobody waited for sets the record straight. */
#define REFUSED_BEFORE                                                                  \
    if                                                                                  \
    :: epoch == to_d.epoch && kind == UNKNOWN -> reopen(to_d)                           \
    :: else                                                                             \
    fi
/* An overdue answer ends the stream: its messages are gone and the service frees what it held. */
#define CUT_BY_US(held, there, back)                                                    \
    held.epoch = 0; held.round = 0; held.valid = 0;                                     \
    do                                                                                  \
    :: len(there) > 0 -> there ? round, epoch, bit_, accepted, i, seen, turn            \
    :: len(there) == 0 -> break                                                         \
    od;                                                                                 \
    do                                                                                  \
    :: len(back) > 0 -> back ? kind, round, epoch, accepted, next, judged               \
    :: len(back) == 0 -> break                                                          \
    od;                                                                                 \
    round = 0; epoch = 0; bit_ = 0; accepted = 0; i = 0; seen = 0; turn = 0;            \
    next = 0; judged = 0; kind = 0
#else
#define REFUSED_BEFORE skip
#define CUT_BY_US(held, there, back) skip
#endif

active proctype Coordinator() {
    byte k, wanted, proposal, round, epoch, accepted, turn, i;
    short judged, seen;
    bit next, bit_;
    bool late = false;
    mtype kind;

    d_step { to_d.epoch = 1; to_d.open = 1; to_v.epoch = 1; to_v.open = 1 };
    do
    :: n >= END -> break
    :: n < END ->
        wanted = 0;
        do      /* K is free: it changes no token */
        :: wanted < KMAX -> wanted++
        :: break
        od;
        if
        :: wanted == 0 -> goto verify
        :: else
        fi;
propose:
#ifdef STREAM
        atomic {        /* a late answer comes first; until it is there the draft is left alone */
            if
            :: late && len(from_draft) == 0 && !LOST(to_draft, from_draft) -> goto verify
            :: late && len(from_draft) == 0 && LOST(to_draft, from_draft) ->
                late = false; reopen(to_d)
            :: late && len(from_draft) > 0 -> late = false
            :: !late
            fi
        };
#endif
        atomic {
            begin(to_d);
            assert(len(to_draft) < QUEUE);
            to_draft ! to_d.round, to_d.epoch, to_d.open, to_d.base, n, log >> to_d.base, wanted;
#ifdef STREAM
            to_d.open = 0; to_d.base = n        /* noted ahead: the stream keeps order */
#endif
        };
        do
        :: atomic {
            len(from_draft) > 0 -> ANY_OF(from_draft, kind(round, epoch, proposal, judged));
            if
            :: !(SAME_EPOCH(to_d) && SAME_ROUND(to_d)) -> REFUSED_BEFORE; proposal = 0; judged = 0
            :: else ->
                turn = 0; round = 0; epoch = 0;
                to_d.open = 0;
                if
                :: kind == ANSWER ->
                    assert(judged == CODE(log, n));     /* it rode ahead of this very log */
                    judged = 0; k = wanted;
                    goto verify
                :: kind == UNKNOWN -> judged = 0; reopen(to_d);
                    if
                    :: goto propose
                    :: goto verify                      /* this round goes on without it */
                    fi
                :: else -> assert(kind != KV_MISSING)   /* base_len is never too much */
                fi
            fi;
            turn = 0; round = 0; epoch = 0
           }
        :: atomic {
            LOST(to_draft, from_draft) || faults > 0 ->
#ifdef STREAM
            if
            :: LOST(to_draft, from_draft) -> reopen(to_d)       /* the stream is gone */
            :: !LOST(to_draft, from_draft) && faults > 0 -> faults--; late = true
            fi;
            goto verify
#else
            if
            :: LOST(to_draft, from_draft)
            :: !LOST(to_draft, from_draft) && faults > 0 -> faults--
            fi;
            if
            :: goto propose                             /* again, as it was */
            :: reopen(to_d); goto propose               /* on a new stream */
            :: reopen(to_d); goto verify
            :: goto verify                              /* without it */
            fi
#endif
           }
        od;

verify:
        atomic {
            wanted = 0;
            begin(to_v);
            assert(len(to_verify) < QUEUE);
            to_verify ! to_v.round, to_v.epoch, to_v.open, to_v.base, n,
                        (log | (proposal << n)) >> to_v.base, k;
#ifdef STREAM
            if      /* meanwhile the draft may take in what it lacks; nobody waits for that */
            :: k == 0 && !late && to_d.base < n && len(to_draft) == 0 && len(from_draft) == 0 ->
                begin(to_d);
                to_draft ! to_d.round, to_d.epoch, to_d.open, to_d.base, n, log >> to_d.base, 0;
                to_d.open = 0; to_d.base = n
            :: true
            fi
#endif
        };
        do
        :: atomic {
            len(from_verify) > 0 -> ANY_OF(from_verify, kind(round, epoch, accepted, next, judged));
            if
            :: !(SAME_EPOCH(to_v) && SAME_ROUND(to_v)) -> accepted = 0; next = 0; judged = 0
            :: else ->
                to_v.open = 0;
                if
                :: kind == ANSWER -> break
                :: kind == UNKNOWN -> turn = 0; round = 0; epoch = 0; reopen(to_v); goto verify
                :: else -> assert(kind != KV_MISSING)
                fi
            fi;
            turn = 0; round = 0; epoch = 0
           }
        :: atomic {
            LOST(to_verify, from_verify) || faults > 0 ->
            if
            :: LOST(to_verify, from_verify)
            :: !LOST(to_verify, from_verify) && faults > 0 -> faults--;
                CUT_BY_US(verifier, to_verify, from_verify)
            fi;
            if
#ifndef STREAM
            :: goto verify
#endif
            :: reopen(to_v); goto verify
            fi
           }
#ifdef STREAM
        :: atomic {     /* that the draft's stream has ended is noticed at any moment */
            draft.epoch == 0 && !to_d.open && LOST(to_draft, from_draft) ->
            late = false; reopen(to_d)
           }
#endif
        od;

        atomic {        /* commit: the only place where the log grows */
            assert(judged == CODE(log | (proposal << n), n + k));   /* the right log was judged */
            log = LOW(log, n) | (LOW(proposal, accepted) << n) | (next << (n + accepted));
#ifdef MUTATE_VERIFIER_KEEPS_REJECTED
            to_v.base = n + k;
#else
            to_v.base = n + accepted;
#endif
            if
#ifdef MUTATE_NO_ROLLBACK_AFTER_FULL_ACCEPT
            :: k > 0 -> to_d.base = n + accepted
#else
            :: k > 0 && accepted < k -> to_d.base = n + accepted
            :: k > 0 && accepted == k -> to_d.base = n + k - 1      /* it lacks the KV of dK */
#endif
            :: else
            fi;
            n = n + accepted + 1;
            accepted = 0; next = 0; judged = 0; proposal = 0; k = 0; kind = 0;
            turn = 0; round = 0; epoch = 0
        }
    od;

    atomic {            /* the text is the undisturbed run's, whatever happened */
        log = LOW(log, END); n = END;
#ifndef ANY_RULE
        seen = FIRST; accepted = PROMPT;
        do
        :: accepted < END -> base_token(accepted); seen = seen | (bit_ << accepted); accepted++
        :: else -> break
        od;
        assert(log == seen);
        seen = 0; accepted = 0; i = 0; bit_ = 0;
#endif
        done = true
    }
}

/* ---- the faults ---------------------------------------------------------------------- */

#ifdef STREAM
#ifdef MUTATE_LOSS_WITHOUT_END
#define DO_LOSE_OR_REPEAT(channel, message) LOSE(channel, message)
#else
#define DO_LOSE_OR_REPEAT(channel, message) false
#endif
#else
#define DO_LOSE_OR_REPEAT(channel, message) LOSE_OR_REPEAT(channel, message)
#endif

#define LOSE(channel, message) \
    atomic { faults > 0 && !done && len(channel) > 0 -> faults--; channel ? message; CLEAR }

#define LOSE_OR_REPEAT(channel, message)                                                \
    atomic {                                                                            \
        faults > 0 && !done && len(channel) > 0 -> faults--;                             \
        ANY_OF(channel, message);                                                       \
        if                                                                              \
        :: skip                                                                         \
        :: channel ! message; channel ! message                                         \
        fi;                                                                             \
        CLEAR                                                                           \
    }

/*
 * It comes back empty, while its memory still holds what it held. What was on its way to it
 * is gone with the connection; answers it sent may be gone or still arrive. (Were an `open`
 * of the dead process to reach its successor, the sequence would be back under its old epoch
 * with other KV than the coordinator believes: MUTATE_REQUESTS_OUTLIVE_CRASH.)
 */
#ifdef MUTATE_REQUESTS_OUTLIVE_CRASH
#define CUT(there, request) skip
#else
#define CUT(there, request) \
    do :: len(there) > 0 -> there ? request :: len(there) == 0 -> break od
#endif
#define CRASH(held, there, back, request, answer)                                       \
    atomic {                                                                            \
        faults > 0 && !done -> faults--;                                                \
        held.epoch = 0; held.round = 0; held.valid = 0;                                 \
        CUT(there, request);                                                            \
        if                                                                              \
        :: skip                                                                         \
        :: do :: len(back) > 0 -> back ? answer :: len(back) == 0 -> break od           \
        fi;                                                                             \
        CLEAR                                                                           \
    }

#define CLEAR d_step { a = 0; b = 0; c = 0; d = 0; e = 0; f = 0; g = 0; s = 0; m = 0; turn = 0 }

active proctype Faults() {
    byte a, b, d, e, f, turn;
    bit c, g;
    short s;
    mtype m;
end:
    do
    :: DO_LOSE_OR_REPEAT(to_draft, a(b, c, d, e, s, f))
    :: DO_LOSE_OR_REPEAT(to_verify, a(b, c, d, e, s, f))
    :: DO_LOSE_OR_REPEAT(from_draft, m(a, b, d, s))
    :: DO_LOSE_OR_REPEAT(from_verify, m(a, b, d, g, s))
    :: CRASH(draft, to_draft, from_draft, a(b, c, d, e, s, f), m(a, b, d, s))
    :: CRASH(verifier, to_verify, from_verify, a(b, c, d, e, s, f), m(a, b, d, g, s))
    od
}

ltl every_request_ends { <> done }
