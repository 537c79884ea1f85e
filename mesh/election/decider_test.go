package election

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"posthouse/mesh"
)

// sketch reads "1*vP5 2v 3 4w 5-v" as facts: a star leads, v votes, w is a witness
// only, P5 has priority 5, - is silent, x is no member, n is no server,
// L is late.
func sketch(s string, now time.Time, silence time.Duration, steady time.Duration) Facts {
	f := Facts{Commit: 1000}
	for _, part := range strings.Fields(s) {
		var id mesh.NodeID
		fmt.Sscanf(part, "%d", &id)
		m := Member{ID: id, Name: part, Voter: !strings.Contains(part, "w")}
		if i := strings.IndexByte(part, 'P'); i > 0 {
			fmt.Sscanf(part[i+1:], "%d", &m.Priority)
		}
		if strings.Contains(part, "*") {
			f.Self = id
		}
		if !strings.Contains(part, "x") {
			f.Members = append(f.Members, m)
		}
		if !strings.Contains(part, "n") {
			f.Servers = append(f.Servers, Server{id, strings.Contains(part, "v")})
		}
		c := Contact{ID: id, Last: now, Since: now.Add(-steady), Index: 1000}
		if strings.Contains(part, "-") {
			c.Last, c.Since = now.Add(-silence), time.Time{}
		}
		if strings.Contains(part, "L") {
			c.Index = 10
		}
		f.Contacts = append(f.Contacts, c)
	}
	return f
}

func TestTheRuleOnVotesAndTheLead(t *testing.T) {
	for _, c := range []struct{ name, facts, want string }{
		{"one node is content", "1*v", ""},
		{"two have one vote", "1*v 2", ""},
		{"a new member is added without a vote", "1*v 2n", "add 2"},
		{"three have three: the first of two", "1*v 2 3", "promote 2"},
		{"and the second", "1*v 2v 3", "promote 3"},
		{"not while one spare is silent: two votes are worse than one", "1*v 2 3-", ""},
		{"nor while one is late", "1*v 2 3L", ""},
		{"four have three", "1*v 2v 3v 4", ""},
		{"five have five", "1*v 2v 3v 4 5", "promote 4"},
		{"seven have five", "1*v 2v 3v 4v 5v 6 7", ""},
		{"candidates vote before witnesses", "1*v 2w 3 4", "promote 3"},
		{"witnesses vote where candidates are too few", "1*v 2w 3w", "promote 2"},
		{"a candidate replaces a witness", "1*v 2vw 3v 4", "promote 4"},
		{"and the witness loses its vote", "1*v 2vw 3v 4v", "demote 2"},
		{"one that left is removed", "1*v 2vx 3v 4v", "remove 2"},
		{"then the votes are adjusted", "1*v 2v", "demote 2"},
		{"a silent voter keeps its vote", "1*v 2v- 3v", ""},
		{"a spare does not replace it before ten minutes", "1*v 2v- 3v 4", ""},
		{"the higher priority leads", "1*v 2vP5 3v", "transfer 2"},
		{"not while it is silent", "1*v 2v-P5 3v", ""},
		{"not while it is late", "1*v 2vLP5 3v", ""},
		{"a spare of higher priority gets a vote", "1*v 2v 3v 4P5", "promote 4"},
		{"a witness that leads gives the lead away", "1*vw 2v 3v", "transfer 2"},
		{"a master that is no member gives the lead away", "1*vx 2v 3v 4v", "transfer 2"},
		{"a witness with the only vote hands it on", "1*vw 2", "promote 2"},
		{"by way of the lead", "1*vw 2v", "transfer 2"},
		{"until the other has it alone", "1vw 2*v", "demote 1"},
	} {
		now := time.Unix(1_000_000, 0)
		r := Rule{TakeBack: time.Minute, DeadFor: 10 * time.Minute}
		if got := show(r.Step(now, sketch(c.facts, now, 9*time.Minute, 2*time.Minute))); got != c.want {
			t.Errorf("%s: %s: got %q, want %q", c.name, c.facts, got, c.want)
		}
	}
	t.Run("ten minutes of silence", func(t *testing.T) {
		now := time.Unix(1_000_000, 0)
		r := Rule{DeadFor: 10 * time.Minute}
		for facts, want := range map[string]string{"1*v 2v- 3v 4": "promote 4", "1*v 2v- 3v 4v": "demote 2", "1*v 2v- 3v": "", "1*v 2v- 3v 4-": ""} {
			if got := show(r.Step(now, sketch(facts, now, 10*time.Minute, 0))); got != want {
				t.Errorf("%s: %q", facts, got)
			}
		}
	})
}

func show(es []Effect) string {
	var out []string
	for _, e := range es {
		out = append(out, fmt.Sprintf("%s %d", e.Action, uint64(e.Node)))
	}
	return strings.Join(out, ", ")
}

func TestTakingTheLeadBackSlowsDownWhileItFlaps(t *testing.T) {
	r := Rule{TakeBack: time.Minute}
	now := time.Unix(1_000_000, 0)
	var holds []time.Duration
	for range 8 {
		since := now
		for {
			now = now.Add(time.Second)
			if show(r.Step(now, sketch("1*v 2vP5 3v", now, 0, now.Sub(since)))) != "" {
				break
			}
		}
		holds = append(holds, now.Sub(since))
		r.NotLeading()
		now = now.Add(20 * time.Second) // it fails, and we lead again
	}
	want := []time.Duration{1, 2, 4, 8, 16, 32, 60, 60}
	for i := range want {
		want[i] *= time.Minute
	}
	if d := cmp.Diff(want, holds); d != "" {
		t.Error(d)
	}
	now = now.Add(2 * time.Hour) // it kept the lead
	r.Step(now, sketch("1*v 2vP5 3v", now, 0, 0))
	if h := r.hold(2); h != time.Minute {
		t.Errorf("after a long time it is still %v", h)
	}
}

func TestTwoVotesAreBorneForSecondsOnly(t *testing.T) {
	r := Rule{}
	now := time.Unix(1_000_000, 0)
	for s := range 40 {
		at := now.Add(time.Duration(s) * time.Second)
		got, want := show(r.Step(at, sketch("1*v 2v 3L", at, 0, 0))), ""
		if s >= 30 {
			want = "demote 2"
		}
		if got != want {
			t.Fatalf("after %d s: %q", s, got)
		}
	}
}

// TestTheRuleComesToRest applies the rule's effects to random meshes: it always
// ends, with the right number of votes, and never takes a live majority away.
func TestTheRuleComesToRest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.Unix(1_000_000, 0)
		var parts []string
		count := rapid.IntRange(1, 8).Draw(t, "nodes")
		for i := 1; i <= count; i++ {
			p := fmt.Sprint(i)
			if i == 1 {
				p += "*v"
			} else {
				p += rapid.SampledFrom([]string{"v", "", "", "n"}).Draw(t, "place") + rapid.SampledFrom([]string{"", "", "", "w"}).Draw(t, "kind")
			}
			parts = append(parts, p+rapid.SampledFrom([]string{"", "", "P5"}).Draw(t, "priority"))
		}
		f := sketch(strings.Join(parts, " "), now, 0, time.Hour)
		r := Rule{TakeBack: time.Minute}
		for step := 0; ; step++ {
			es := r.Step(now, f)
			if len(es) == 0 {
				break
			}
			if step > 50 {
				t.Fatalf("%v goes on for ever: %v", parts, es)
			}
			e := es[0]
			at := slices.IndexFunc(f.Servers, func(s Server) bool { return s.ID == e.Node })
			switch e.Action {
			case AddMember:
				f.Servers = append(f.Servers, Server{ID: e.Node})
			case Promoted:
				f.Servers[at].Voter = true
			case Demoted:
				f.Servers[at].Voter = false
			case RemoveNode:
				f.Servers = slices.Delete(f.Servers, at, at+1)
			case Transfer:
				f.Self = e.Node
				r = Rule{TakeBack: time.Minute}
			}
			if e.Node == f.Self && (e.Action == Demoted || e.Action == RemoveNode) {
				t.Fatal("the master took its own vote")
			}
			now = now.Add(time.Second)
			for i := range f.Contacts {
				f.Contacts[i].Last = now
			}
		}
		if votes := votersOf(f.Servers); votes != target(count) || len(f.Servers) != count {
			t.Fatalf("%v: %d votes of %d", parts, votes, count)
		}
	})
}

func TestAFenceLetsOnlyTheNewestMasterPass(t *testing.T) {
	a := func(lineage byte, gen, term uint64) mesh.Authority {
		return mesh.Authority{Lineage: mesh.ID{lineage}, Generation: gen, Term: term}
	}
	var kept []mesh.Authority
	f := NewFence(mesh.Authority{}, func(x mesh.Authority) error { kept = append(kept, x); return nil })
	for _, c := range []struct {
		a    mesh.Authority
		want error
	}{{a(1, 1, 5), nil}, {a(1, 1, 5), nil}, {a(1, 1, 4), ErrStale}, {a(1, 1, 6), nil}, {a(2, 2, 1), nil}, {a(1, 1, 99), ErrStale}, {a(3, 2, 7), ErrRivals}, {a(2, 2, 2), nil}} {
		err := f.Admit(c.a)
		if c.want == nil && err != nil || c.want != nil && !strings.Contains(fmt.Sprint(err), c.want.Error()) {
			t.Errorf("%+v: %v, want %v", c.a, err, c.want)
		}
	}
	if len(kept) != 4 {
		t.Errorf("kept %v", kept)
	}
}

func TestWhatIsDoneBeforeAVoteIsTaken(t *testing.T) {
	for _, c := range []struct{ name, facts, want string }{
		{"the rest is a majority", "1*v 2v 3v", ""},
		{"so it is without the one that is to go", "1*v 2v- 3v", ""},
		{"a silent one would be missed: its vote goes first", "1*v 2v 3v-", "demote 3"},
		{"no vote, nothing to do", "1*v 2 3v 4v-", ""},
		{"nobody answers: a change could not be committed", "1*v 2v- 3v-", "nothing"},
		{"two of five silent", "1*v 2v 3v 4v- 5v-", "demote 5"},
		{"and the one that is to go as well", "1*v 2v- 3v 4v 5v-", ""},
		{"three of five silent with it", "1*v 2v- 3v 4v- 5v-", "nothing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			now := time.Unix(1_000_000, 0)
			got := ""
			if x, ok := before(now, sketch(c.facts, now, time.Second, time.Minute), 2); ok && x.Action == 0 {
				got = "nothing"
			} else if ok {
				got = fmt.Sprintf("%s %d", x.Action, x.Node)
			}
			if got != c.want {
				t.Errorf("%s: %q, want %q", c.facts, got, c.want)
			}
		})
	}
}
