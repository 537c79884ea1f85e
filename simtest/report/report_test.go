package report

import (
	"bytes"
	"regexp"
	"strings"
	"testing"
	"time"

	"posthouse/simtest/record"
)

// run is a small record: two offices, one cut, one power cut.
func run() *record.Record {
	r := &record.Record{Title: "A <test>", About: "of the page", Seed: 7, Offices: []string{"hq", "plzen"}, FaultsEnd: 50 * time.Minute, Length: time.Hour,
		States:   []record.State{{Office: "hq", Power: record.On}, {Office: "plzen", Power: record.On}, {At: 20 * time.Minute, Office: "hq", Power: record.Dead}, {At: 30 * time.Minute, Office: "hq", Power: record.On}},
		Cuts:     []record.Cut{{A: "hq", B: "plzen", At: 5 * time.Minute, Until: 10 * time.Minute}},
		Moments:  []record.Moment{{At: time.Minute, Text: "something <b>happens</b>"}},
		Mail:     record.Mail{Sent: 1003, Taken: 1000, Refused: 3, Arrived: 1000},
		Verdicts: []record.Verdict{{Number: 1, Text: "all arrives", Checked: 1000}, {Number: 2, Text: "nobody looked"}},
	}
	for at := time.Duration(0); at < r.Length; at += time.Minute {
		master := []string{"hq", "hq"}
		if at >= 20*time.Minute && at < 40*time.Minute {
			master = []string{"", "plzen"}
		}
		r.Samples = append(r.Samples, record.Sample{At: at, Queue: []int{int(at / time.Minute), -1}, Oldest: []int64{0, 0}, Master: master, Term: []uint64{2, 3}})
		r.Deliveries = append(r.Deliveries, record.Delivery{From: "hq", To: "plzen", At: at, Took: 3 * time.Millisecond << (at / (3 * time.Minute))})
	}
	r.Retries = []record.Retry{{At: 6 * time.Minute, Office: "hq", To: "plzen"}, {At: 7 * time.Minute, Office: "hq", To: "plzen"}, {At: time.Hour, Office: "plzen", To: "gateway"}}
	return r
}

func TestThePageStandsAlone(t *testing.T) {
	var b bytes.Buffer
	if err := Write(&b, run()); err != nil {
		t.Fatal(err)
	}
	page := b.String()
	for _, banned := range []string{"<script", "http://", "https://", "url(", "@import", "<link", "A <test>", "<b>happens"} {
		if strings.Contains(page, banned) {
			t.Errorf("the page has %s", banned)
		}
	}
	for _, want := range []string{"prefers-color-scheme: dark", "hq leads, term 2", "plzen leads, term 3", "hq is cut off from plzen, 00:05:00 to 00:10:00",
		"hq: without power, 00:20:00 to 00:30:00", "plzen: tried 1 times in vain, 00:06:00 to 00:06:30; 2 in all", "not touched", "every promise held", "A &lt;test&gt;"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if bad := regexp.MustCompile(`NaN|Inf|="-[0-9]`).FindString(page); bad != "" {
		t.Errorf("a drawing has %s", bad)
	}
}

func TestAnEmptyRunHasAPage(t *testing.T) {
	var b bytes.Buffer
	if err := Write(&b, &record.Record{Title: "nothing", Offices: []string{"hq"}}); err != nil {
		t.Fatal(err)
	}
	if bad := regexp.MustCompile(`NaN|Inf`).FindString(b.String()); bad != "" {
		t.Errorf("a drawing has %s", bad)
	}
}

func TestTheSentenceSaysWhatHappenedToTheMail(t *testing.T) {
	r := run()
	if got := Sentence(r); !strings.HasPrefix(got, "The offices accepted 1,000 messages, and every one of them arrived once. Half were there within") || !strings.HasSuffix(got, "3 were not accepted, so that their senders knew and could try again.") {
		t.Errorf("%s", got)
	}
	r.Mail.Excused = 40
	if got := Sentence(r); !strings.Contains(got, "accepted 960 messages") || !strings.Contains(got, "40 more were for people of an office") {
		t.Errorf("%s", got)
	}
	r.Mail.Lost, r.Verdicts[0].Broken = 2, 1
	if got := Sentence(r); !strings.HasPrefix(got, "This went wrong: promise 1 (all arrives) was not kept. Of 1,000 messages that the offices accepted, 2 were lost.") {
		t.Errorf("%s", got)
	}
}
