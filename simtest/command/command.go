// Package command is posthouse-sim, the simulator for people: it plays scenario
// files and random seeds on whole nodes, prints what happens and the verdicts,
// and answers questions of capacity.
//
// The program is this package's test binary (`make posthouse-sim`), since whole
// nodes in virtual time need testing/synctest. Nothing else calls it.
package command

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"posthouse/appliance/config"
)

// Exit codes.
const (
	held   = 0
	broken = 1  // an invariant did not hold, or the run did not come to its end
	usage  = 64 // of sysexits.h: wrong words, or something wrong in the file
)

// Terminal is where a command writes.
type Terminal struct {
	Out, Err io.Writer
	Bar      bool // Out shows a bar that is written over: it is a person's terminal
	// News is how often random says on Err how far it is; 0 means every 30 s.
	News time.Duration
}

// usageError is a mistake of who asks.
type usageError struct{ error }

func misuse(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

const help = `posthouse-sim plays a whole mesh in virtual time: the nodes that ship, on
simulated lines, disks and power, watched from outside.

  posthouse-sim run FILE.toml|NAME [--report OUT.html] [--seed N] [--short] [--json]
        plays a scenario: a file of yours, or one that ships (see list)
  posthouse-sim random [--seeds N | --minutes T] [--seed N] [--nodes N] [--length 5m] [--jobs N]
                       [--with FAULT] [--shrink 10m] [--story] [--trace]
        random faults and load from seed N on, as many seeds at a time as there are processors or --jobs,
        with a line of news every half minute;
        --with plays those alone that have a fault, as the list at the end names it (uplink: narrow lines);
        --shrink takes events out of a plan that fails while it still does, for so long;
        --story tells each, --trace tells all, one after the other
  posthouse-sim capacity [--offices 5] [--people 20] [--mail 40] [--size "75 kB"] [--inside "30 %"] [--outside "40 %"]
                         [--line "20 Mbit/s"] [--latency "15 ms"] [--cut "24h"] [--seed N] [--json]
        how long a queue takes to drain after a cut, the disk that it needs, what
        the master must pass: people at each office, messages that each writes a day
  posthouse-sim list
        the scenarios that ship
  posthouse-sim show NAME
        the text of one, to start your own from
  posthouse-sim help

Exit code 0: every invariant that was touched held. 1: not. 64: wrong words, or
something wrong in the file.
`

// Main does what the words say and returns the exit code. It runs inside a test
// because virtual time does; sub-tests that fail keep their own log.
func Main(t *testing.T, args []string, term Terminal) int {
	code, err := do(t, args, term)
	var wrong usageError
	var problems *config.Problems
	switch {
	case err == nil:
		return code
	case errors.As(err, &problems):
		fmt.Fprintln(term.Err, err)
		return usage
	case errors.As(err, &wrong):
		fmt.Fprintf(term.Err, "posthouse-sim: %v; posthouse-sim help tells more\n", err)
		return usage
	}
	fmt.Fprintf(term.Err, "posthouse-sim: %v\n", err)
	return broken
}

func do(t *testing.T, args []string, term Terminal) (int, error) {
	if len(args) == 0 {
		fmt.Fprint(term.Out, help)
		return usage, nil
	}
	switch verb, args := args[0], args[1:]; verb {
	case "run":
		return run(t, args, term)
	case "random":
		return random(t, args, term)
	case "capacity":
		return held, capacities(args, term)
	case "list":
		return held, list(args, term)
	case "show":
		return held, show(args, term)
	case "help", "--help", "-h":
		fmt.Fprint(term.Out, help)
		return held, nil
	default:
		return 0, misuse("no command %q", verb)
	}
}

// flags parses a command's flags, which may stand before and after its n words.
func flags(name string, args []string, n int, define func(*flag.FlagSet)) (words []string, err error) {
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	f.SetOutput(io.Discard)
	define(f)
	for {
		if err := f.Parse(args); err != nil {
			return nil, misuse("%s: %v", name, err)
		}
		if args = f.Args(); len(args) == 0 {
			break
		}
		words, args = append(words, args[0]), args[1:]
	}
	if len(words) != n {
		return nil, misuse("%s: want %d words beside the flags, have %q", name, n, strings.Join(words, " "))
	}
	return words, nil
}

// write writes a file that a flag asked for.
func write(name, what string, content []byte) error {
	if err := os.WriteFile(name, content, 0o644); err != nil {
		return fmt.Errorf("write %s: %w", what, err)
	}
	return nil
}
