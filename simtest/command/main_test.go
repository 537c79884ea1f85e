package command

import (
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
)

// words are those of the command line, when this binary is posthouse-sim.
var words []string

// TestMain lets the binary be posthouse-sim when that is its name: then it runs
// one test, the program.
func TestMain(m *testing.M) {
	if strings.HasPrefix(filepath.Base(os.Args[0]), "posthouse-sim") {
		words = append([]string{}, os.Args[1:]...)
		os.Args = []string{os.Args[0], "-test.run=^TestPosthouseSim$", "-test.timeout=0"}
		if os.Getenv("GOGC") == "" {
			debug.SetGCPercent(400) // memory is cheaper here than time
		}
	}
	os.Exit(m.Run())
}

// TestPosthouseSim is the program. When nothing failed that a test would tell of,
// it ends the process itself, before the testing package says PASS.
func TestPosthouseSim(t *testing.T) {
	if words == nil {
		code := Main(t, []string{"help"}, Terminal{Out: t.Output(), Err: t.Output()})
		if code != held {
			t.Errorf("help ends with %d", code)
		}
		return
	}
	info, err := os.Stdout.Stat()
	code := Main(t, words, Terminal{Out: os.Stdout, Err: os.Stderr, Bar: err == nil && info.Mode()&os.ModeCharDevice != 0})
	if !t.Failed() {
		os.Exit(code)
	}
}
