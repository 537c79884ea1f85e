package imapd

import (
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"

	"posthouse/mailstore"
)

// watcher is a client that believes what it is told, and nothing else
// (FAULTS.md, I4).
type watcher struct {
	*client
	name     string
	readOnly bool
	uids     []int             // by number; 0 is not known yet
	flags    map[int]string    // by UID, sorted
	gone     map[int]bool      // UIDs that were expunged
	asked    map[string]string // verb of each command under way
	pending  string            // tag
}

var (
	numbered = regexp.MustCompile(`^\* (\d+) (EXISTS|EXPUNGE|RECENT|FETCH)(?: \((?:UID (\d+))?(?: ?FLAGS \(([^)]*)\))?\))?$`)
	others   = regexp.MustCompile(`^\* (OK|FLAGS|SEARCH|ESEARCH)\b`)
)

func (w *watcher) errorf(format string, args ...any) {
	w.t.Helper()
	w.t.Errorf("%s: %s", w.name, fmt.Sprintf(format, args...))
}

// hear takes an untagged response.
func (w *watcher) hear(l, during string) {
	m := numbered.FindStringSubmatch(l)
	if m == nil {
		if !others.MatchString(l) {
			w.errorf("not understood: %q", l)
		}
		return
	}
	n, _ := strconv.Atoi(m[1])
	switch m[2] {
	case "EXISTS":
		if n < len(w.uids) {
			w.errorf("EXISTS fell from %d to %d", len(w.uids), n)
		}
		for len(w.uids) < n {
			w.uids = append(w.uids, 0)
		}
	case "EXPUNGE":
		if during == "FETCH" || during == "STORE" || during == "SEARCH" {
			w.errorf("EXPUNGE during %s", during)
		}
		if n < 1 || n > len(w.uids) {
			w.errorf("EXPUNGE %d of %d", n, len(w.uids))
			return
		}
		if u := w.uids[n-1]; u != 0 {
			w.gone[u] = true
			delete(w.flags, u)
		}
		w.uids = slices.Delete(w.uids, n-1, n)
	case "FETCH":
		if n < 1 || n > len(w.uids) || m[3] == "" {
			w.errorf("FETCH of %d among %d: %q", n, len(w.uids), l)
			return
		}
		u, _ := strconv.Atoi(m[3])
		if w.gone[u] {
			w.errorf("UID %d came back", u)
		}
		if old := w.uids[n-1]; old != 0 && old != u {
			w.errorf("number %d was UID %d and is %d", n, old, u)
		}
		w.uids[n-1] = u
		fs := strings.Fields(m[4])
		slices.Sort(fs)
		w.flags[u] = strings.Join(fs, " ")
	}
}

func (w *watcher) ask(n int, cmd string) {
	w.pending = fmt.Sprintf("%s%d", w.name, n)
	verb, _, _ := strings.Cut(cmd, " ")
	w.asked = map[string]string{w.pending: verb}
	w.say(w.pending + " " + cmd + "\r\n")
}

func (w *watcher) answer() {
	if w.pending == "" {
		return
	}
	verb := w.asked[w.pending]
	for {
		l := w.line()
		if l == "" {
			w.t.Fatalf("%s: connection ended during %s", w.name, verb)
		}
		if a, ok := strings.CutPrefix(l, w.pending+" "); ok {
			if !strings.HasPrefix(a, "OK") && !(w.readOnly && strings.HasPrefix(a, "NO")) {
				w.errorf("%s: %s", verb, a)
			}
			w.pending = ""
			return
		}
		w.hear(l, verb)
	}
}

// TestEachSessionsViewIsTheTruth lets sessions on one folder, one of them by
// EXAMINE, do random things at once, and compares what each was told with what
// is there.
func TestEachSessionsViewIsTheTruth(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) { truth(t, seed) })
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func truth(t *testing.T, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 4))
	w := newWorld(t, Config{})
	f := w.folder("ada", "INBOX")
	var all []*watcher
	for i := range 4 {
		all = append(all, &watcher{client: w.login("ada"), name: string(rune('a' + i)), readOnly: i == 3, flags: map[int]string{}, gone: map[int]bool{}})
	}
	for i, s := range all {
		s.ask(0, map[bool]string{false: "SELECT INBOX", true: "EXAMINE INBOX"}[i == 3])
		s.answer()
	}
	number := func(s *watcher) string {
		n := max(len(s.uids), 1)
		a, b := 1+rnd.IntN(n), 1+rnd.IntN(n)
		return [...]string{fmt.Sprint(a), fmt.Sprintf("%d:%d", a, b), "1:*", "*", fmt.Sprintf("%d,%d", b, a)}[rnd.IntN(5)]
	}
	uid := func(s *watcher) string {
		if len(s.uids) == 0 {
			return "1:*"
		}
		u := max(s.uids[rnd.IntN(len(s.uids))], 1)
		return [...]string{fmt.Sprint(u), fmt.Sprintf("%d:*", u), fmt.Sprintf("%d:%d", u, u+3)}[rnd.IntN(3)]
	}
	flag := func() string { return [...]string{`\Seen`, `\Deleted`, `\Flagged`, "kw1", "kw2"}[rnd.IntN(5)] }
	for step := range 150 {
		if rnd.IntN(10) == 0 {
			w.put(f, simple)
		}
		if rnd.IntN(15) == 0 {
			if _, err := f.Expunge(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
		}
		busy := map[*watcher]bool{}
		for range 1 + rnd.IntN(3) {
			s := all[rnd.IntN(len(all))]
			if busy[s] {
				continue
			}
			busy[s] = true
			some := len(s.uids) > 0
			var cmd string
			switch k := rnd.IntN(14); {
			case k == 0:
				cmd = fmt.Sprintf("APPEND INBOX (%s) {%d+}\r\n%s", flag(), len(simple), simple)
			case k == 1 && some:
				cmd = "COPY " + number(s) + " INBOX"
			case k == 2:
				cmd = "EXPUNGE"
			case k == 3:
				cmd = "UID EXPUNGE " + uid(s)
			case k == 4 && some:
				cmd = "MOVE " + number(s) + " Trash"
			case k <= 6 && some:
				cmd = "STORE " + number(s) + " " + [...]string{"+FLAGS", "-FLAGS", "FLAGS"}[rnd.IntN(3)] + " (" + flag() + ")"
			case k == 7:
				cmd = "UID STORE " + uid(s) + " +FLAGS (" + flag() + ")"
			case k == 8:
				cmd = "UID SEARCH ALL"
			case k == 9:
				cmd = "SEARCH UNSEEN"
			case k <= 11 && some:
				cmd = "FETCH " + number(s) + " (UID FLAGS)"
			case k == 12:
				s.ask(step+1, "IDLE")
				if l := s.line(); !strings.HasPrefix(l, "+") {
					s.hear(l, "IDLE")
				}
				s.say("DONE\r\n")
				continue
			default:
				cmd = "NOOP"
			}
			s.ask(step+1, cmd)
		}
		for _, s := range all {
			s.answer()
		}
	}
	_, infos, err := f.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		s.ask(1000, "NOOP")
		s.answer()
		for i, u := range s.uids { // only what it was never told
			if _, known := s.flags[u]; u == 0 || !known {
				s.ask(1001, fmt.Sprintf("FETCH %d (UID FLAGS)", i+1))
				s.answer()
			}
		}
		var want, got []string
		for _, m := range infos {
			want = append(want, fmt.Sprint(m.UID, sortedFlags(m.Flags)))
		}
		for _, u := range s.uids {
			got = append(got, fmt.Sprint(u, s.flags[u]))
		}
		if !slices.Equal(want, got) {
			s.errorf("seed %d: believes\n%v\ntrue is\n%v", seed, got, want)
		}
	}
}

func sortedFlags(flags []mailstore.Flag) string {
	var fs []string
	for _, f := range flags {
		fs = append(fs, string(f))
	}
	slices.Sort(fs)
	return strings.Join(fs, " ")
}
