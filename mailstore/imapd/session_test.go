package imapd

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const multipart = "From: =?utf-8?q?Eva_Nov=C3=A1kov=C3=A1?= <eva@company.com>\r\nTo: ada@company.com\r\nSubject: =?utf-8?q?P=C5=99=C3=ADloha?=\r\n" +
	"Date: Mon, 2 Feb 2026 09:59:58 +0100\r\nMessage-ID: <m1@company.com>\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n" +
	"--b\r\nContent-Type: text/plain; charset=iso-8859-2\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n=AEluva slova\r\n" +
	"--b\r\nContent-Type: message/rfc822\r\n\r\nSubject: inner\r\n\r\ninner text\r\n" +
	"--b\r\nContent-Type: application/pdf; name=a.pdf\r\nContent-Disposition: attachment; filename=a.pdf\r\nContent-Transfer-Encoding: base64\r\n\r\nAAECAw==\r\n--b--\r\n"

const simple = "From: bob@company.com\r\nSubject: plain\r\nDate: Tue, 3 Feb 2026 10:00:00 +0100\r\n\r\nHello, World\r\n"

// TestDialogues plays testdata/*.txt: "C: " is sent, "S: " must come, "S~ " is a
// pattern that must match, "---" starts with an unused connection.
func TestDialogues(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no dialogues", err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			w := newWorld(t, Config{})
			w.put(w.folder("ada", "INBOX"), multipart, simple, simple)
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			c := w.login("ada")
			for n, line := range strings.Split(string(text), "\n") {
				kind, rest, _ := strings.Cut(line, " ")
				switch kind {
				case "C:":
					c.say(rest + "\r\n")
				case "S:":
					if got := c.line(); got != rest {
						t.Fatalf("line %d:\n got %q\nwant %q", n+1, got, rest)
					}
				case "S~":
					if got := c.line(); !regexp.MustCompile("(?s)^" + rest + "$").MatchString(got) {
						t.Fatalf("line %d:\n got  %q\nwant ~%q", n+1, got, rest)
					}
				case "---":
					c.Close()
					c = w.login("ada")
				case "", "#":
				default:
					t.Fatalf("line %d is neither C: nor S:", n+1)
				}
			}
		})
	}
}

func TestSectionsOfAMessage(t *testing.T) {
	w := newWorld(t, Config{})
	w.put(w.folder("ada", "INBOX"), multipart)
	c := w.login("ada")
	c.ok("SELECT INBOX")
	for section, want := range map[string]string{
		"BODY[]":                             multipart,
		"BODY[TEXT]":                         multipart[strings.Index(multipart, "--b"):],
		"BODY[HEADER]":                       multipart[:strings.Index(multipart, "--b")],
		"BODY[HEADER.FIELDS (TO X)]":         "To: ada@company.com\r\n\r\n",
		"BODY[1]":                            "=AEluva slova",
		"BODY[1.MIME]":                       "Content-Type: text/plain; charset=iso-8859-2\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n",
		"BODY[2]":                            "Subject: inner\r\n\r\ninner text",
		"BODY[2.HEADER]":                     "Subject: inner\r\n\r\n",
		"BODY[2.TEXT]":                       "inner text",
		"BODY[2.1]":                          "inner text",
		"BODY[2.HEADER.FIELDS.NOT (FROM)]":   "Subject: inner\r\n\r\n",
		"BODY[3]":                            "AAECAw==",
		"BODY[4]":                            "",
		"BODY[1.1]":                          "",
		"BODY[]<5.4>":                        multipart[5:9],
		"BODY[]<100000.4>":                   "",
		"BODY[3]<6.100>":                     "==",
		"BINARY[1]":                          "\xaeluva slova",
		"BINARY[3]":                          "\x00\x01\x02\x03",
		"BINARY[3]<1.2>":                     "\x01\x02",
		"BODY[4294967295.4294967295.HEADER]": "",
	} {
		u := c.ok("FETCH 1 " + section)
		_, lit, ok := strings.Cut(u[0], "}\r\n")
		lit = strings.TrimSuffix(lit, ")")
		if !ok || lit != want {
			t.Errorf("%s: %q, want %q", section, lit, want)
		}
	}
	if u := c.ok("FETCH 1 BINARY.SIZE[3]"); u[0] != "* 1 FETCH (BINARY.SIZE[3] 4)" {
		t.Error(u)
	}
	structure := `* 1 FETCH (BODYSTRUCTURE (("text" "plain" ("charset" "iso-8859-2") NIL NIL "quoted-printable" 13 0 NIL NIL NIL NIL)` +
		`("message" "rfc822" NIL NIL NIL "7bit" 28 (NIL "inner" NIL NIL NIL NIL NIL NIL NIL NIL) ("text" "plain" NIL NIL NIL "7bit" 10 0 NIL NIL NIL NIL) 2 NIL NIL NIL NIL)` +
		`("application" "pdf" ("name" "a.pdf") NIL NIL "base64" 8 NIL ("attachment" ("filename" "a.pdf")) NIL NIL) "mixed" ("boundary" "b") NIL NIL NIL))`
	if u := c.ok("FETCH 1 BODYSTRUCTURE"); u[0] != structure {
		t.Error(cmp.Diff(structure, u[0]))
	}
}

func TestLargeBodiesAreStreamedWhole(t *testing.T) {
	w := newWorld(t, Config{})
	big := "Subject: big\r\nContent-Transfer-Encoding: base64\r\n\r\n" + strings.Repeat(strings.Repeat("QUJD", 19)+"\r\n", 20_000)
	c := w.login("ada")
	c.ok(fmt.Sprintf("APPEND INBOX (\\Flagged x) \"01-Feb-2026 10:00:00 +0100\" {%d+}\r\n%s", len(big), big))
	c.ok("SELECT INBOX")
	if u := c.ok("FETCH 1 (BODY.PEEK[] FLAGS INTERNALDATE RFC822.SIZE)"); !strings.Contains(u[0], big) || !strings.Contains(u[0], `FLAGS (\Flagged x)`) || !strings.Contains(u[0], "01-Feb-2026 09:00:00 +0000") && !strings.Contains(u[0], " 1-Feb-2026 09:00:00 +0000") {
		t.Errorf("%.200q", u[0])
	}
	if u := c.ok("FETCH 1 BINARY.PEEK[]"); !strings.Contains(u[0], big) {
		t.Errorf("%.100q", u[0])
	}
	if u := c.ok("FETCH 1 BINARY.PEEK[1]"); !strings.Contains(u[0], "~{1140000}\r\n"+strings.Repeat("ABC", 1000)) {
		t.Errorf("%.100q", u[0])
	}
}

func TestSearch(t *testing.T) {
	w := newWorld(t, Config{})
	f := w.folder("ada", "INBOX")
	w.put(f, multipart, simple, "Subject: third\r\nX-Mark: yes\r\n\r\n"+strings.Repeat("lorem ipsum ", 20_000)+"needle žluva end\r\n")
	c := w.login("ada")
	c.ok("SELECT INBOX")
	c.ok(`STORE 2 FLAGS (\Seen Work)`)
	for q, want := range map[string]string{
		"ALL":                               "1 2 3",
		"SUBJECT \"příloha\"":               "1",
		"SUBJECT PLAIN":                     "2",
		"FROM \"nováková\"":                 "1",
		"FROM bob@company.com":              "2",
		"TO ada":                            "1",
		"HEADER X-Mark \"\"":                "3",
		"HEADER X-Mark YES":                 "3",
		"HEADER Message-ID m1@":             "1",
		"BODY \"žluva\"":                    "1 3",
		"BODY inner":                        "1",
		"BODY \"hello, world\"":             "2",
		"TEXT \"subject: plain\"":           "2",
		"BODY \"ipsum needle\"":             "3",
		"BODY zzz":                          "",
		"SEEN":                              "2",
		"UNSEEN":                            "1 3",
		"KEYWORD work":                      "2",
		"UNKEYWORD work":                    "1 3",
		"RECENT":                            "",
		"OLD":                               "1 2 3",
		"NOT SEEN":                          "1 3",
		"OR SEEN SUBJECT third":             "2 3",
		"LARGER 1000":                       "3",
		"SMALLER 200":                       "2",
		"SINCE 3-Feb-2026":                  "1 2 3",
		"BEFORE 3-Feb-2026":                 "",
		"ON 3-Feb-2026":                     "1 2 3",
		"SENTON 2-Feb-2026":                 "1",
		"SENTSINCE 3-Feb-2026":              "2",
		"2:*":                               "2 3",
		"UID 1,3":                           "1 3",
		"NOT (OR 1 2)":                      "3",
		"UID 7:*":                           "3",
		"(SEEN) NOT BODY \"not there\"":     "2",
		"CHARSET UTF-8 SUBJECT \"příloha\"": "1",
		"UNSEEN NOT HEADER X-Mark \"\"":     "1",
		"NOT NOT NOT NOT SUBJECT plain ":    "2",
	} {
		u := c.ok("SEARCH " + q)
		if got := strings.TrimPrefix(strings.TrimPrefix(u[0], "* SEARCH"), " "); got != want {
			t.Errorf("%s: %q, want %q", q, got, want)
		}
	}
	if u := c.ok("UID SEARCH RETURN (MIN MAX COUNT ALL SAVE) NOT SEEN"); !strings.HasSuffix(u[0], " UID ALL 1,3 MIN 1 MAX 3 COUNT 2") {
		t.Error(u)
	}
	if u := c.ok("UID FETCH $ FLAGS"); len(u) != 2 || !strings.HasPrefix(u[1], "* 3 FETCH") {
		t.Error(u)
	}
	c.no("SEARCH "+strings.Repeat("OR SEEN ", 600)+"SEEN", "NO [LIMIT]")
	c.no("SEARCH 9", "BAD")
}

func TestExamineChangesNothing(t *testing.T) {
	w := newWorld(t, Config{})
	f := w.folder("ada", "INBOX")
	w.put(f, simple, simple)
	c := w.login("ada")
	c.ok("SELECT INBOX")
	c.ok(`STORE 2 FLAGS \Deleted`)
	before, infos, _ := f.List()
	c.ok("EXAMINE INBOX")
	c.no(`STORE 1 +FLAGS \Seen`, "NO")
	c.no(`UID STORE 1 +FLAGS.SILENT \Seen`, "NO")
	c.no("EXPUNGE", "NO")
	c.no("UID EXPUNGE 2", "NO")
	c.no("MOVE 1 Trash", "NO")
	c.ok("FETCH 1:2 (BODY[] BINARY[1])")
	c.ok("COPY 1 Trash")
	c.ok("CLOSE")
	after, now, _ := f.List()
	if d := cmp.Diff(before, after) + cmp.Diff(infos, now); d != "" {
		t.Error(d)
	}
	c.ok("SELECT INBOX")
	c.ok("CLOSE")
	if st, _ := f.Status(); st.Messages != 1 {
		t.Error("CLOSE after SELECT leaves what is deleted")
	}
}

func TestFolderNamesAreMatchedInBoundedTime(t *testing.T) {
	for _, c := range []struct {
		ref, pattern, name string
		want               bool
	}{
		{"", "*", "a/b", true}, {"", "%", "a/b", false}, {"", "%", "a", true}, {"", "a/%", "a/b", true}, {"", "a%", "a/b", false},
		{"a", "%", "a/b", true}, {"a/", "b", "a/b", true}, {"x", "/a", "a", true}, {"", "inbox", "INBOX", true}, {"", "", "", true},
		{"", "*b", "a/b", true}, {"", "%/%", "a/b", true}, {"", "%%b", "a/b", false}, {"", "*a*", "bab", true},
	} {
		if got := newPattern(c.ref, c.pattern).match(c.name); got != c.want {
			t.Errorf("%q %q on %q: %v", c.ref, c.pattern, c.name, got)
		}
	}
	if newPattern("", strings.Repeat("*a", 500)+"b").match(strings.Repeat("a", 1000)) {
		t.Error("matches")
	}
}

func TestAMatchAcrossReadsIsFound(t *testing.T) {
	for n := range 20 {
		text := strings.Repeat("x", n) + "Žluťoučký kůň" + strings.Repeat("y", 30)
		for size := 4; size < 12; size++ {
			ok, err := streamContains(strings.NewReader(text), []byte("žluťoučký kůň"), make([]byte, size))
			if !ok || err != nil {
				t.Errorf("not found behind %d bytes by reads of %d: %v", n, size, err)
			}
			if ok, _ = streamContains(strings.NewReader(text), []byte("žluťoučký kun"), make([]byte, size)); ok {
				t.Error("found what is not there")
			}
		}
	}
}

func TestTwoSessionsSeeEachOther(t *testing.T) {
	w := newWorld(t, Config{})
	w.put(w.folder("ada", "INBOX"), simple, simple, simple)
	a, b := w.login("ada"), w.login("ada")
	a.ok("SELECT INBOX")
	b.ok("SELECT INBOX")
	a.ok(`STORE 2 +FLAGS (\Deleted)`)
	if u := b.ok("NOOP"); !bytes.Equal([]byte(strings.Join(u, "|")), []byte(`* 2 FETCH (UID 2 FLAGS (\Deleted))`)) {
		t.Error(u)
	}
	a.ok("EXPUNGE")
	// Not within FETCH, STORE and SEARCH, whose numbers it would change.
	if u := b.ok("FETCH 1:3 UID"); len(u) != 2 || u[1] != "* 3 FETCH (UID 3)" {
		t.Error(u)
	}
	if u := b.ok("SEARCH ALL"); u[0] != "* SEARCH 1 3" {
		t.Error(u)
	}
	if u := b.ok("NOOP"); len(u) != 1 || u[0] != "* 2 EXPUNGE" {
		t.Error(u)
	}
	if u := b.ok(`STORE 2 FLAGS.SILENT (x)`); len(u) != 0 {
		t.Error(u)
	}
	if u := a.ok("NOOP"); len(u) != 1 || u[0] != `* 2 FETCH (UID 3 FLAGS (x))` {
		t.Error(u)
	}
	a.say("i IDLE\r\n")
	if l := a.line(); !strings.HasPrefix(l, "+") {
		t.Error(l)
	}
	w.put(w.folder("ada", "INBOX"), simple)
	if l := a.line(); l != "* 3 EXISTS" {
		t.Error(l)
	}
	b.ok("MOVE 1 Trash")
	if l := a.line(); l != "* 1 EXPUNGE" {
		t.Error(l)
	}
	a.say("DONE\r\n")
	if l := a.line(); l != "i OK IDLE completed" {
		t.Error(l)
	}
}
