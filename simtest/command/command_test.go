package command

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// said runs a command and returns its exit code and what it printed.
func said(t *testing.T, args ...string) (int, string) {
	t.Helper()
	var out, err bytes.Buffer
	code := Main(t, args, Terminal{Out: &out, Err: &err})
	return code, out.String() + err.String()
}

func TestWrongWordsEndWith64AndSayWhatIsWrong(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad.toml")
	if err := os.WriteFile(bad, []byte("title = \"x\"\nlenght = \"1h\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{nil, "posthouse-sim run"},
		{[]string{"rnu"}, `no command "rnu"`},
		{[]string{"run"}, "want 1 words"},
		{[]string{"run", "strom"}, `no scenario "strom" ships; there are `},
		{[]string{"run", "nothing.toml"}, "no such file"},
		{[]string{"run", bad}, `bad.toml:2: lenght: no such key; did you mean "length"?`},
		{[]string{"run", "storm", "--sed", "1"}, "flag provided but not defined"},
		{[]string{"random", "--nodes", "9"}, "--nodes is 2 to 5"},
		{[]string{"random", "--seeds", "0"}, "more than nothing"},
		{[]string{"capacity", "--line", "fast"}, "want a bandwidth"},
		{[]string{"capacity", "--offices", "1"}, "2 to 10,000 offices"},
		{[]string{"show", "x"}, "no scenario"},
	} {
		code, text := said(t, tc.args...)
		if code != usage || !strings.Contains(text, tc.want) {
			t.Errorf("%q ended with %d: %s", tc.args, code, text)
		}
	}
}

func TestARunPrintsTheTimelineAndTheVerdicts(t *testing.T) {
	dir := t.TempDir()
	file, page := filepath.Join(dir, "two.toml"), filepath.Join(dir, "two.html")
	text := "title = \"Two\"\nlength = \"5 min\"\n[[office]]\nname = \"hq\"\n[[office]]\nname = \"plzen\"\n[mail]\nper_hour = 600\nprobe = \"1 min\"\n[[event]]\nat = \"1 min\"\ncut = \"hq\"\nfor = \"2 min\"\n"
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	code, out := said(t, "run", file, "--report", page, "--seed", "5")
	for _, want := range []string{"Two\n2 offices, 5 min, seed 5", "00:01:00  cut: the lines between hq and plzen", "every one of them arrived once",
		"✓  1  accepted mail arrives exactly once", "·  9  a revoked node", "not touched"} {
		if !strings.Contains(out, want) {
			t.Errorf("it does not say %q", want)
		}
	}
	if html, err := os.ReadFile(page); err != nil || !bytes.Contains(html, []byte("every promise held")) {
		t.Errorf("the page: %v", err)
	}
	if code != held || t.Failed() {
		t.Errorf("ended with %d:\n%s", code, out)
	}
}

func TestRandomSeedsSayHowFarTheyAre(t *testing.T) {
	var out, news bytes.Buffer
	code := Main(t, []string{"random", "--seeds", "1", "--seed", "2", "--nodes", "2", "--length", "1m"}, Terminal{Out: &out, Err: &news, News: 50 * time.Millisecond})
	first, _, _ := strings.Cut(news.String(), "\n")
	if !strings.Contains(news.String(), "  0 seeds done, 1 under way, ") || !strings.HasSuffix(first, "; 0 violations") {
		t.Errorf("the news are %q", news.String())
	}
	if !strings.Contains(out.String(), "1 seeds, ") || strings.Contains(out.String(), "seeds done") {
		t.Errorf("it says %q", out.String())
	}
	if code != held {
		t.Errorf("ended with %d", code)
	}
}

func TestCapacityAnswers(t *testing.T) {
	code, out := said(t, "capacity", "--offices", "12", "--people", "40", "--line", "2 Mbit/s", "--cut", "3h")
	for _, want := range []string{"12 offices of 40 people", "the master must pass", "disk that they need", "by the fluid limit", "in the message-level model"} {
		if !strings.Contains(out, want) {
			t.Errorf("it does not say %q:\n%s", want, out)
		}
	}
	if code != held {
		t.Errorf("ended with %d", code)
	}
}

func TestASeedThatStandsStillIsSeenOnce(t *testing.T) {
	w, now := stands{}, time.Now()
	for i := range 20 { // minutes
		under := map[uint64]time.Duration{1: time.Duration(i), 2: 7}
		still := w.look(under, now.Add(time.Duration(i)*time.Minute))
		if want := i == 6 || i == 12 || i == 18; want != slices.Equal(still, []uint64{2}) || !want && len(still) > 0 {
			t.Errorf("after %d min: %v", i, still)
		}
	}
	if w.look(nil, now); len(w) != 0 {
		t.Error("what is done is remembered")
	}
}
