"""The plots and word lists of the demo's stories (see demo_stories.py): plain data, all of it made up for this."""

NAMES = {
    ("child", "girl"): "Lily Mia Anna Sara Lucy Emma Zoe Ella Ruby Amy Nora Rosie Molly Daisy Lola Kate Jane Sue",
    ("child", "boy"): "Tom Ben Max Sam Tim Jack Leo Finn Joe Dan Nick Mike Jake Billy Bob Toby Fred Andy",
    ("animal", "girl"): "Dot Coco Bella Penny Mimi Honey Lulu Kiki Poppy Tilly",
    ("animal", "boy"): "Pip Fuzzy Bobo Teddy Rusty Momo Bubbles Barney Nibbles Hoppy",
}
PRONOUNS = {"girl": "she her her", "boy": "he him his"}
GROWN_UPS = {"mom": "girl", "dad": "boy", "grandma": "girl", "grandpa": "boy"}
WORDS = {
    "kind": "bear,bunny,fox,mouse,duck,frog,squirrel,bird,pig,turtle,cat,puppy,hen,goat",
    "indoor": "play ball,run around,jump around,throw balls,skip,dance",
    "child home": "in a little house by the sea,in a small town,on a farm,in a house on a hill,near a big park",
    "animal home": "in the green forest,in a hole under a tree,near a pond,on a farm,at the foot of a hill",
    "child hobby": "play outside,sing songs,draw pictures,run in the yard,read books,look at the clouds,dance,"
    "tell jokes,play with blocks,pick flowers,look for bugs,ride in the car,make funny faces,splash in puddles",
    "animal hobby": "play in the leaves,sing songs,run in the grass,jump over rocks,look at the stars,dance,tell jokes,"
    "play hide and seek,roll down the hill,splash in puddles,sleep in the sun,smell the flowers",
}
# Templates: [a|b] is one of several; {word} comes from here, from the cast or from the plot's table, and is
# capitalised where its name is.
PHRASES = {
    "nice": "[little|small|happy|kind|young|sweet|brave|funny|good|nice]",
    "adj": "[red|blue|green|yellow|pink|purple|shiny]",
    "open": "[[Once upon a time, there was|Once there was|One time, there was|There once was] a {nice} {kind} named "
    "{name}.|Once upon a time, a {nice} {kind} named {name} lived {home}.|"
    "{name} was a {nice} {kind}[ who lived {home}|].]",
    "likes": "{He} [liked|loved] to {hobby}[ and {hobby2}|][| all day| every day].",
    "day": "one [[sunny|warm|nice|bright|cool|quiet] |][day|morning|afternoon]",
    "after": "[From that day on|After that|From then on]",
    "learned": "[{name} learned that|{name} now knew that|That day, {name} learned that|{name} was glad to know that]",
    "end": "[until the sun went down|until it was time to go home|until dinner time|all afternoon|for a long time]",
    "sad": "[sad|very sad|so sad]",
    "glad": "[happy|very happy|so happy|full of joy]",
    "smiled": "[smiled|laughed|jumped up and down|smiled a big smile]",
    "pal": "friend {friend}",  # animals: see _cast
}

# A plot: who may act in it; its table (names of the columns, then rows); after a blank line, the story.
PLOTS = ["""child animal
toy | spot
doll | under the big tree
ball | behind the old wall
book | on the swing
hat | next to the pond
scarf | by the fence
drum | in the tall grass
kite | on top of the hill
bell | near the flowers
blanket | on the green bench
whistle | at the edge of the water
cup | beside the little bridge

{open} {He} had a {adj} {toy}. {He} loved it more than anything and [took it everywhere|kept it close all day].

{Day}, {name} could not find the {toy}. {He} looked [under the bed|behind the door|next to the window], but it was not
there. {He} looked [by the stairs|under the table|in the garden], but it was not there[ either|]. {name} began to cry.
"[Where is my {toy}?|I lost my {toy}!|My {toy} is gone!]" {he} said.

{His} {pal} [heard {him}|came to see what was wrong]. "[Don't cry|Don't worry|Don't be sad], {name}. [I will help
you|We can look together|Let's find it]," {friend} said. "[Where did you play with it|Where were you] yesterday?"
{name} thought [hard|for a moment]. "I was {spot}!" {he} said. They [ran|walked|went] there, and there was the {toy},
{spot}!

{name} [hugged|picked up] the {toy} and {smiled}. "Thank you, {friend}! You are [a good friend|a great friend|so
smart]," {he} said. {After}, {name} always [put the {toy} back in its place|knew where {his} {toy} was]. [And when
{friend} lost something, {name} helped {fhim} find it.|{learned} it is easier to look for something with a friend.]
""", """child animal
toy | play
ball | kick the ball
kite | fly the kite
truck | push the truck
drum | play the drum
boat | sail the boat
wagon | pull the wagon
horn | blow the horn
hoop | roll the hoop
swing | ride on the swing
train | drive the train
sled | ride on the sled
rope | jump over the rope

{open} {He} had a new {toy}. It was {adj} and [very nice|very pretty|just right for {him}]. {He} liked to {play} [all
day|every day|from morning to night].

{Day}, {his} {pal} came to [visit|see {him}]. "[Wow, what a nice {toy}!|I like your {toy}!|Your {toy} is so pretty!]
[Can I {play} too?|Can I have a turn?|May I try it?]" {friend} asked. "No! [It is mine|This is my {toy}|I don't want
to share]," said {name}. {friend} [was quiet|was very sad] and [went home|walked away|sat down under a tree].

{name} tried to {play} alone, but it was no fun. {His} {mom} said, "[You have more fun when you share|A {toy} is more
fun with a friend|It is good to share with a friend], {name}." So {he} [ran|went|walked] to {friend} and said, "I am
sorry. [Do you want to {play} with me?|You can have a turn now.|Let's {play} together.]"

{friend} smiled. "Yes! Thank you, {name}!" {fhe} said. They [took turns|played together] and laughed {end}. {learned}
[it is fun to share|sharing makes two people happy|a friend is better than any toy].
""", """child
fear | scene | act | found
the dark | At night, {his} room was very dark. | turned off the light | A star smiled in at the window.
the big slide | {Day}, they went to the park. The slide was very tall. | went down the slide | Whoosh! It was fun.
the water | {Day}, they went to the lake. It was deep. | put both feet in the water | Little fish swam by.
thunder | One night, there was a big storm. Boom! | looked out of the window | The thunder was only a big noise.
the big dog | {Day}, the big dog from next door came to the fence. | held out {his} hand | The dog wagged its tail.
the old barn | {Day}, a ball rolled into the old barn. | went in to get it | There were only three sleepy cats.
the horse | {Day}, they went to see a brown horse. | gave the horse an apple | Its nose was as soft as a blanket.
the high bridge | {Day}, they came to a high bridge. | walked over it | From the top, {he} could see the whole town.
the deep snow | {Day}, there was deep snow outside. | jumped into the snow | It was as soft as a pillow.

{open} {likes} But there was one thing {he} did not like. {He} was [afraid|scared|very afraid] of {fear}.

{scene} {name} [hid behind {his} {mom}|held {his} {mom}'s hand very tight|wanted to run away]. "I am scared," {he}
said [in a small voice|and closed {his} eyes|and began to cry].

{His} {mom} [sat down next to {him}|gave {him} a big hug|took {his} hand]. "[It is okay to be scared|Everyone is
scared sometimes|I was scared of {fear} too when I was little]," {mhe} said. "[I am here with you.|We can try it
together.|You are braver than you think.]" {name} [took a deep breath|counted to three|thought for a moment]. Then,
[slowly|very slowly|step by step], {he} {act}. {found}

"[I did it!|Look, {Mom}, I did it!|I am not scared any more!]" {name} [shouted|said|cried]. {His} {mom}
[clapped|laughed|was so proud]. {After}, {name} was not afraid of {fear} any more. [{learned} being brave means you
try even when you are scared.|{He} even helped {his} {pal}, who was afraid of it too.]
""", """child
skill | fail | tip
ride a bike | fell off the bike and hurt {his} knee | Look ahead and keep your feet moving
swim | got water in {his} nose | Kick your legs and keep your head up
whistle | blew and blew, but no sound came out | Make your mouth small and blow softly
jump rope | got {his} feet stuck in the rope | Jump when the rope touches the ground
skate | slipped and fell down with a bump | Bend your knees and go slowly
catch a ball | dropped the ball | Watch the ball and use two hands
fly a kite | ran very fast, but the kite fell on the grass | Hold the string tight and wait for the wind
draw a horse | drew a horse that looked like a potato | Start with a round belly and then add four legs
play the piano | played a song that sounded like a cat | Play slowly, one finger at a time
bake bread | made bread that was as hard as a stone | Mix it well and give it time

{open} {He} wanted to learn to {skill}. {His} {pal} could do it very well, and {name} [watched {fhim} every day|wanted
to do it too|wished {he} could do the same].

{Day}, {name} [tried for the first time.|wanted to try it.|said, "Today I will do it!"] {He} {fail}. {He} tried again,
but it was [too hard|no better]. "[I can't do it!|It is too hard!|I will never learn it!]" {he} [cried|said|shouted].
{He} [sat down on the ground|kicked a stone|wanted to go home] and was {sad}.

{friend} came and sat next to {him}. "[Don't give up|Don't be sad|Don't stop now]! It was hard for me too," {fhe}
said. "{tip}." {name} [wiped {his} eyes|stood up|listened] and tried again. {He} tried every morning, and [little by
little, it got better|each day, it was a bit easier].

Then, one day, it worked! "Look, {friend}! I can {skill}!" {name} shouted. {friend} [clapped|cheered|danced] and said,
"[I knew you could do it!|You did it!|Good job!]" {learned} [you can do hard things if you keep trying|it is good to
try again and again|hard things get easy if you do not give up].
""", """child
animal | problem | fix | joy | play
bird | It had a hurt wing and could not fly. | put a soft cloth around its wing | The bird sang a pretty song. | sang
kitten | It was up in a tree and could not get down. | stood on a box and reached up | The kitten said meow. | played
turtle | It was on its back and could not turn over. | turned it over | The turtle nodded. | sat in the sun
puppy | It was wet and cold. | put {his} coat around the puppy | The puppy wagged its tail. | ran around
duck | It could not find its mother. | took the duck to its mother at the pond | The duck said quack, quack! | played
frog | It was far from the pond, and the sun was hot. | carried it to the water | The frog jumped three times. | hopped
bunny | It was stuck under a branch. | pulled the branch away | The bunny moved its little nose. | hopped in the grass
fish | It was in a puddle that was too small. | carried it to the river in a bucket | The fish splashed. | swam
butterfly | It was stuck in some mud. | held out a leaf for it to climb on | The butterfly dried its wings. | danced

{open} {likes} {Day}, {name} and {his} {mom} went for a walk [in the park|near the woods|by the river].
[Suddenly|Then], {name} heard a [small|sad|strange] sound. {He} looked around and saw a little {animal}. {problem}

"Oh no! [Can we help it|Can we do something], {Mom}?" {name} asked. "[Yes, but we must be gentle|Of course. Be very
careful|We can try. Go slowly]," said {his} {mom}. [{name} thought for a moment. Then {he}|{name} was very careful.
{He}] {fix}. [It was not easy, but {he} did not give up. |]At last, the {animal} was safe. {joy}

"[Goodbye|Bye-bye|Take care], little {animal}!" said {name}. The next day, {name} went back to the same place. The
{animal} was there! It [knew {him}|came to {him}|was happy to see {him}]. They {play} together {end}. {His} {mom}
smiled and said, "You were kind, and now you have a new friend." {name} was {glad}.
""", """child
thing
vase
cup
plate
lamp
bowl
clock
jar
teapot
mirror

{open} {His} {mom} had a {adj} {thing} and loved it very much. "Please don't {indoor} in the house, {name}," {mhe}
[always|often] said.

One [gray|dark|cold] [day|morning|afternoon], it was raining, and {name} was bored. {He} began to {indoor} in the
[kitchen|living room]. [Crash!|Bang!|Oh no!] The {thing} fell on the floor and broke. {name} was [scared|worried].
{He} hid the pieces [under the sofa|in a box|behind the door]. Soon {his} {mom} came in. "[Where is my {thing}?|Have
you seen my {thing}?]" {mhe} asked.

"I don't know," said {name}. But it was not true, and {his} [tummy hurt|face got hot|heart felt heavy]. {He} could not
[eat|play|smile]. [At last|After a while], {he} went to {his} {mom} and said, "I broke the {thing}. I am [so|very]
sorry."

{His} {mom} was quiet for a moment. Then {mhe} [gave {him} a hug|took {his} hand]. "[Thank you for telling me|I am
proud that you told me the truth]," {mhe} said. They [put the pieces together with glue|cleaned up the floor
together]. {name} felt [much better|light and happy again]. {learned} [it is always best to tell the truth|the truth
makes your heart feel better]. The next day, {he} went outside to {indoor}.
""", """child
build | where | stuff | ruin | idea
tower | in {name}'s room | blocks | the cat ran by and it fell down | we will make the bottom wide
castle | at the beach | wet sand | a big wave washed it away | we will build it far from the water
snowman | in the snow | snow | the head rolled off and fell apart | we will make the head small
little house | in the yard | old boxes | the wind blew it over | we will put stones inside
bridge | at the stream | sticks | the sticks slipped into the water | we will tie them with string
fort | in the living room | pillows | one pillow slid and it came down | we will use the big chairs too
road | in the garden | flat stones | a dog ran over it and the stones flew away | we will push them in deep
wall | behind the house | mud and leaves | the rain came and it got soft | we will wait for the sun to dry it

{name} and {friend} were [good|best|great] friends. {Day}, they were {where}. "Let's build a {build}!" said {name}.
"Yes! [A really big one|The best one ever]!" said {friend}. They [found|got] some {stuff} and started to work.

Soon the {build} was [very big|almost done]. But then {ruin}. "Oh no!" cried {friend}. "This is your fault!" said
{name}. "No, it is [not|your fault]!" said {friend}. They were both [angry|mad] and [did not talk|looked away] for a
long time.

Then {name} saw that {friend} had tears in {fhis} eyes. "I am sorry that I was mad," said {name}. "[Do you want to try
again?|Can we build it again?]" "Okay," said {friend}. "This time, {idea}." So they worked together, side by side.

The new {build} was [even bigger|even better|much stronger] than the first one! {name}'s {mom} came to look. "What a
[great|nice|beautiful] {build}!" {mhe} said. The two friends were {glad}. They learned [that it is good to work as a
team|that friends should not fight|that it is fun to work together].
""", """child
gift | begin | oops | fix
a cake | mixed eggs, milk and sugar in a bowl | the bowl fell on the floor | cleaned the floor and mixed a new cake
a card | drew a big red heart on a card | some paint spilled on it | turned the spot of paint into a yellow sun
a necklace | put red and blue beads on a string | the string broke | found every bead under the table
a picture | painted the whole family | the cat walked over it with wet feet | painted flowers around the cat's feet
a crown | cut a crown out of gold paper | the crown tore in two | taped it and put shiny stars on top
a song | made up a funny song | all the words went out of {his} head | drew little pictures to help with the words
a bag | cut a bag out of old cloth | there was a big hole in the side | put a green leaf over the hole
a boat | made a boat out of wood | it did not float | cut a piece off, so that it was not so heavy

Soon it was the birthday of {name}'s {mom}, and {name} wanted to give {mhim} something special. {name} had no money.
"I know! I will make {gift}!" {he} said.

{His} {pal} came to help. [First, {name}|They sat at the table, and {name}] {begin}. It was very [nice|good] so far.
But then {oops}. "Oh no! Now [it is all bad|everything is bad|I have nothing to give]!" cried {name}. {He} was {sad}.

"[Wait|Don't cry|Don't give up]," said {friend}. "[I have an idea.|We can fix it.|We can still do it.]" Together, they
{fix}. [It took a long time. |]In the end, it was even [better|nicer] than before.

[The next day|On the big day], {name} [ran|went] to {his} {mom}. "Happy birthday!" {he} shouted. "I made this for you,
and {friend} helped me." "[This is the best gift ever|It is so beautiful|You made this? I love it]!" said {his} {mom},
and {mhe} gave {him} a big hug. {learned} [a gift from the heart is the best gift|love is the best part of a gift].
""", """child
rule | saw | did | trouble | saved
don't go near the pond | saw a flower by the pond | tried to get it | {He} slipped into the water. | pulled {him} out
don't climb the tall tree | saw an apple at the top | climbed up | {He} could not get down. | took {him} down
stay on the path | saw a butterfly | ran after it | Soon {he} was lost. | called {his} name and found {him}
don't eat the berries | saw sweet red berries | ate a lot of them | {His} tummy began to hurt. | gave {him} some water
don't open the gate | saw a baby goat | opened the gate | A big goat pushed {him} into the mud. | picked {him} up
don't jump on the old bench | saw the old bench | jumped on it | It broke, and {his} foot got stuck. | got {him} out
don't go into the cave | saw something shiny in the cave | went inside | It was very dark. | led {him} out

{open} {likes} {Day}, {his} {mom} said, "[You can go and play|Have fun outside], {name}. But {rule}." "[Okay|Yes|All
right], {Mom}," said {name}, and {he} ran outside.

At first, {name} [played in the grass|sang a song|looked at the clouds]. Then {he} {saw}. "[I will be very quick|Just
this one time|Nobody will see me]," {he} thought. {He} forgot what {his} {mom} had said, and {he} {did}. [Oh no!|Oh
dear!] {trouble} "[Help|Help me]! [Please help me!|Is anyone there?|{Mom}, where are you?]" {name} cried.

{His} {pal} heard {him} and ran to get {name}'s {mom}. {Mom} came as fast as {mhe} could. {Mhe} {saved}. {name} hugged
{mhim} and began to cry. "I am sorry. I did not listen," {he} said. "I know," said {his} {mom}. "[I tell you these
things because I love you|I want you to be safe|I was so worried]."

{name} said thank you to {friend}. {After}, {name} listened when {his} {mom} told {him} something. {learned} rules
keep [us|you] safe.
""", """animal
kind | fkind | trouble | act | done
mouse | bear | My ball rolled into this tiny hole | pushed the ball out of the hole with {his} nose | the ball was free
mouse | lion | My foot is stuck in this net | pulled at the strings of the net, one by one | {friend} was free
bug | frog | I dropped my ring between these rocks | went down between the rocks | {he} came back with the ring
ant | pig | My honey is inside this log | rolled the honey pot out of the log | the honey was there for both of them
bird | bear | My kite is up in this tree | flew up to the thin branch and pulled at the string | the kite came down
duck | horse | My hat is in the pond, and I can't swim | swam out as fast as {he} could | {he} came back with the hat
frog | cow | My bell fell into this well | jumped down into the well | the bell rang again
squirrel | fox | My red balloon is stuck in this tree | climbed to the top of the tree | the balloon came down

{open} {name} was very small. {likes} But when {he} asked {his} {pal}, "[Can I play with you?|Can I come with you?|Can
I help you?]", {friend} only laughed. "You are too [small|little]," {fhe} said. {name} was {sad}.

{Day}, {name} heard {friend} cry. {name} ran to {fhim}. "What is wrong?" {he} asked. "{trouble}," said {friend}.
"[I don't know what to do.|Nobody can help me.]" "[I think I can do it|Let me try|I have an idea]!" {he} said.

{friend} was not sure, but {name} was brave. {He} {act}. [It was hard, but {he} did not stop.|It took a long time, but
{he} did not give up.] [At last|Then], {done}! "Hooray!" they both shouted.

{friend} [looked down|felt bad]. "I am sorry that I laughed at you," {fhe} said. "You are small, but you [are very
brave|have a big heart|helped me so much]. [Will you be my friend?|Can we play now?]" "Yes," said {name}, and {he}
{smiled}. They played {end}. {learned} [small animals can do big things|it does not matter how big you are].
""", """child
thing | spot | helper | way | someone
hat | in a tall tree | giraffe | took the hat with its long neck | a bug that was on its back
kite | on a roof | man | climbed up with a ladder | an old lady with a heavy bag
balloon | in the top of a tree | monkey | climbed up in no time | a bird that could not find its nest
scarf | on a high fence | horse | pulled the scarf down with its teeth | a kitten in the rain
toy plane | on a high wall | woman | pushed the toy plane down with a stick | a snail in the middle of the road
flag | on top of a barn | farmer | brought a long pole from the barn | a girl who had lost her shoe
ribbon | on a high branch | squirrel | ran up the tree and brought the ribbon down | a bee in a puddle

{open} {He} had a {adj} {thing}, and {he} [loved it very much|took it everywhere|was very proud of it]. One windy
[day|morning|afternoon], {name} [went for a walk|played on the hill] with {his} {pal}. Whoosh! The wind took the
{thing} and carried it [up, up, up|high into the air]. "[Come back|Stop, wind|Oh no, my {thing}]!" {name} shouted.

They ran after it. At last, the {thing} got stuck {spot}. {name} jumped as high as {he} could, but {he} could not
reach it. "[It is too high|We will never get it]," said
{name}.

Just then, a {helper} came by. "[Why are you so sad|What is wrong], little {kind}?" the {helper} asked. "[The wind
took my {thing}|My {thing} is up there], and I can't reach it," said {name}. "[I can help you|That is no problem|Let
me see]," said the {helper}. The {helper} {way}. Soon the {thing} was back in {name}'s hands.

"Thank you! [How can I thank you?|What can I do for you?]" said {name}. "[Just be kind to someone else|Help someone
else one day]," said the {helper}. The next day, {name} saw {someone}, and {he} went to help. {learned} [one kind act
brings another|kindness goes from one to the next].
""", """child animal
game | slip
hide and seek | hid in a place that was much too easy
tag | ran the wrong way
ball | dropped the ball
follow the leader | walked into a bush
catch | threw the ball into the bushes
jumping games | jumped into a puddle
pirates | fell off the ship, which was only a log

{open} {name} was new here, and {he} did not know anyone. {Day}, {he} [went to the park|walked to the big field|sat on
a log by the stream] and saw the others play {game}. {name} wanted to play too, but {he} was shy. {He} [sat down under
a tree|hid behind a bush|looked at {his} feet] and watched. "[What if they don't like me?|What if they say no?]" {he}
thought.

Then {friend}, a {fkind} with a [kind face|big smile|{adj} hat], came over. "Hi! I am {friend}. [What is your
name?|Who are you?]" {fhe} asked. "I am {name}," {he} said [very softly|in a small voice]. "[Do you want to play with
us|Would you like to join us]? We need one more." "[Me? Yes, please!|Can I? Oh yes!|Really? I would love to!]" said
{name}.

{friend} showed {him} how to play. [At first|The first time], {name} {slip}, but nobody was mad. "[It is okay|That
happens to all of us]," said {friend}. "[Try again|You will get it]!" They played {end}.

[That night|At home], {name} told {his} {mom} about it. "I [have a friend now|made a new friend]," {he} said.
"Tomorrow, if I see someone who is alone, I will [say hello|ask them to play]." {His} {mom} [hugged {him}|was proud].
{name} was {glad}.
""", """child animal
plant | big | gave
flower | a tall flower, as yellow as the sun | gave the first flower to {his} {mom}
pumpkin | a pumpkin as big as a chair | made a big pie and shared it with {friend}
bean plant | a bean plant as high as the wall | cooked the beans with {his} {mom}
tomato | a plant with ten red tomatoes | gave five tomatoes to {friend} and kept five
melon | a round green melon | cut the melon and gave a piece to everyone
carrot | a carrot as big as a boot | pulled it out with {friend}
berry bush | a bush full of sweet blue berries | filled a bowl with berries for {friend}

{open} {likes} {Day}, {his} {mom} gave {him} a [small|tiny|little] seed. "What is it?" asked {name}. "[It is a
surprise|You will see|There is a {plant} inside]," said {his} {mom}. "[Put it in the ground|Plant it in the garden]
and give it water. Then you have to wait."

{name} [made a small hole|found a sunny place] and put the seed in the ground. {He} gave it water every day. {He}
waited and waited, but [nothing happened|there was only dirt]. "Why does it not grow?" {he} asked. {He} [wanted to dig
it up|was tired of waiting|was angry at the seed].

{His} {pal} came by. "[Don't dig it up|Don't be angry|Wait a bit more]," said {friend}. "[Good things take time|It is
working under the ground|It needs sun, water and time]. I will wait with you." So they [sang songs to it|told it
stories|played games next to it]. Then, one morning, there was something green! "Look, {friend}! It is growing!"
{name} shouted.

Each day it got [bigger|taller] and [bigger|greener]. In the end, it was {big}. {name} was {glad}. {He} {gave}.
{learned} [good things take time|it is good to wait and to take care of things].
""", """child
noise | source | care
Tap, tap, tap! | a little bird at the window | let the bird sit on a warm towel
Scratch, scratch! | a kitten that wanted to come in | gave the kitten a bowl of milk
Drip, drip, drip! | a frog under a wet pipe | took the frog to the pond
Boo-hoo! | a baby owl that had lost its nest | put the owl back on its branch
Crunch, crunch! | a mouse with a piece of apple | gave it the rest of the apple
Rattle, rattle! | a cat in an empty box | lifted the box and let it out
Woof! | a puppy that was alone in the yard | made a soft bed for the puppy

It was night, and the moon was [big and round|bright|high in the sky]. {name}, a {nice} {kind}, was in bed, but {he}
could not sleep. "[I can't sleep|I am not tired|I am wide awake], {Mom}!" {he} called.

{His} {mom} came in. "[Try to count the stars|Drink some water|Close your eyes and think of nice things]," {mhe} said.
{name} tried, but it did not help. Then {he} heard a [strange|funny|scary] noise. {noise} "[What is that?|Did you hear
that?]" {name} asked, and {he} [hid under the blanket|held {his} {mom}'s hand].

"Let's [go and see|find out]," said {his} {mom}. They [took a light|held hands] and went [to the door|outside] on
quiet feet. There it was: {source}! {name} began to laugh. "[It is only you|You can't sleep either]!" {he} said. {His}
{mom} {care}. "[Now everyone can sleep|There, that is better]," {mhe} said.

Back in bed, {name} [felt warm and safe|was not scared any more]. {His} {mom} [gave {him} a kiss|sat on the bed] and
told {him} about [a bear who found the moon|a boat that sailed to the stars|a little cloud who lost its rain]. Soon
{name}'s eyes [closed|got heavy]. {learned} [a noise in the night is not always scary|you should look before you are
afraid].
"""]  # fmt: skip
